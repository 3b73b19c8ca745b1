"""Compiling a run ahead of time: what is compiled is what training runs, for devices that are there or not, in both
flavours, on eight devices; programs come back from a file, or are refused."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rl.cli import main as grpo
from rl.config.load import load_config
from rl.devices.mesh import create_mesh, num_row_shards
from rl.devices.programs import Program
from rl.grpo_trainer import train
from rl.models.flavours import policy_from_config
from rl.run.executables import MAGIC, LoadedProgram, fingerprint, open_compiled, read_file, save_compiled
from rl.run.metrics import read_metrics
from rl.state.optimizer import create_training_optimizer
from rl.state.origin import model_shape
from rl.state.states import InitStateFn, get_abstract_state
from rl.tools.programs.compile import compile_config, compile_loop, compile_one, main
from rl.tools.programs.compile_advice import advice
from rl.tools.programs.compile_report import CompileReport, ProgramReport
from rl.tools.programs.compile_text import num_slices, roofline, to_json, to_text
from rl.tools.programs.hlo import Collective, array_bytes, work_of
from rl.tools.programs.loop_programs import loop_programs, read_shape
from rl.tools.programs.topologies import CHIPS, find_devices
from rl.training.packing import TrainCompletion, TrainGroup, pack
from rl.training.shaped_inputs import get_shaped_inputs
from rl.training.train_step import Minibatch
from tests.helpers.places import FILES, REWARDS, ROOT

FLAVOURS = {"linen": False, "nnx": True}
NAMES = ["state init", "reference init", "prefill", "decode", "logprobs", "train step"]
MODELS = FILES / "models"
TINY = [
    *("model.arch.hidden_size=16", "model.arch.intermediate_size=24", "model.arch.num_layers=1"),
    *("model.arch.num_heads=2", "model.arch.num_kv_heads=2", "model.arch.head_dim=8", "model.arch.vocab_size=259"),
    *("data.source=arithmetic", "data.args={operation: add, digits: 1}", "data.max_prompt_length=5"),
    f'rewards.functions=[{{function: "{REWARDS}:digit_share", name: digits}}]',
    *("sampling.max_completion_length=4", "grpo.steps=2", "grpo.prompts_per_step=2", "grpo.group_size=2"),
    *("grpo.max_tokens_per_microbatch=64", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "eval.every=0"),
]
FOUR = ("mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=1")  # as v5e:2x2 has, in place of eight


def tiny(*overrides: str, flavour: str = "nnx"):
    return load_config(None, [*TINY, f"pure_nnx={str(FLAVOURS[flavour]).lower()}", *overrides])


def parts_of(config):
    mesh = create_mesh(config.mesh)
    policy = policy_from_config(config, read_shape(config)[1], mesh)
    return mesh, policy, InitStateFn(policy, create_training_optimizer(config, policy)[1], config.seed)


def shapes_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@contextlib.contextmanager
def persistent_cache(folder):
    """Compiled programs are kept in `folder` meanwhile."""
    settings = {"compilation_cache_dir": str(folder), "persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, f"jax_{name}") for name in settings}

    def set_cache(values):
        for name, value in values.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()

    set_cache(settings)
    try:
        yield
    finally:
        set_cache(before)


# A flavour chooses no path of the tool: the flavours of the whole compilation are a matrix.
ONE_FLAVOUR = [pytest.param("linen", marks=pytest.mark.long), "nnx"]


@pytest.fixture(scope="module", params=ONE_FLAVOUR)
def saved(request, tmp_path_factory):
    """A tiny run's configuration, its report, and the file of its programs."""
    path = tmp_path_factory.mktemp("compiled") / "programs.bin"
    config = tiny(flavour=request.param)
    return config, compile_config(config, devices="cpu:8", save=str(path)), path


# Shapes


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_shaped_inputs_are_those_of_the_state_and_the_minibatches_of_a_run(flavour):
    config = tiny("grpo.minibatches=2", flavour=flavour)
    mesh, _policy, init_state_fn = parts_of(config)
    inputs = get_shaped_inputs(config, mesh, init_state_fn)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    assert (inputs.state, inputs.state_shardings) == (abstract.shapes, abstract.shardings)
    completion = TrainCompletion(np.int32([5, 6, 7]), 1.0, np.zeros(3), np.zeros(3))
    batch = pack([TrainGroup(np.int32([1, 2]), [completion, completion])], inputs.plan)
    fields = {
        name: value
        for name, value in inputs.minibatch.batch._asdict().items()
        if value is not None and not name.endswith("gprobs_MRCL")
    }
    assert shapes_of(fields) == shapes_of({name: np.asarray(getattr(batch, name)) for name in fields})
    logprobs = ("old_logprobs_MRCL", "reference_logprobs_MRCL", "sampler_logprobs_MRCL")
    assert {getattr(inputs.minibatch.batch, name).shape for name in logprobs} == {batch.mask_MRCL.shape}
    assert (mesh.size, num_row_shards(mesh, config.mesh.rules)) == (8, 4)
    assert (
        inputs.minibatch_shardings.batch.tokens_MRT.shard_shape(batch.tokens_MRT.shape)[1] == inputs.plan.num_rows // 4
    )
    assert jax.tree.structure(inputs.minibatch) == jax.tree.structure(inputs.minibatch_shardings)
    assert inputs.state_annotations == abstract.annotations
    axes = jax.tree.structure(inputs.minibatch).flatten_up_to(inputs.minibatch_annotations)
    assert [len(names) for names in axes] == [shape.ndim for shape in jax.tree.leaves(inputs.minibatch)]
    assert inputs.minibatch_annotations.batch.tokens_MRT == (None, "batch", None)


def test_both_flavours_have_the_same_shaped_inputs():
    linen, nnx = (get_shaped_inputs(c := tiny(flavour=f), *parts_of(c)[::2]) for f in FLAVOURS)
    assert linen == nnx


def test_a_minibatch_holds_only_what_its_loss_needs():
    config = tiny("grpo.beta=0", "grpo.top_entropy_quantile=0.5")
    inputs = get_shaped_inputs(config, *parts_of(config)[::2])
    assert inputs.minibatch.batch.old_logprobs_MRCL is None
    assert inputs.minibatch.batch.reference_logprobs_MRCL is None
    assert inputs.minibatch_annotations.batch.old_logprobs_MRCL is None
    assert inputs.minibatch.entropy_MRCL.shape == inputs.minibatch.batch.mask_MRCL.shape
    assert isinstance(inputs.minibatch, Minibatch)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ("", {"logprobs"}),
        ("grpo.beta=0", set()),
        ("grpo.beta=0 grpo.minibatches=2", {"logprobs"}),
        ("grpo.beta=0 grpo.epochs=2 grpo.old_logprobs=sampler", set()),
        ("grpo.top_entropy_quantile=0.5", {"logprobs", "entropies"}),
        ("grpo.preset=reinforce++", {"logprobs"}),
        ("lora.rank=2", {"reference logprobs"}),
        ("lora.rank=2 grpo.epochs=2 grpo.beta=0", {"logprobs"}),
    ],
)
def test_a_run_has_only_the_passes_without_gradient_that_its_loss_reads(overrides, names):
    programs = loop_programs(tiny(*overrides.split()), jax.devices()).programs
    passes = {"logprobs", "reference logprobs", "entropies"}
    assert {program.name for program in programs} & passes == names
    for program in programs:
        if program.name in passes:
            function, arguments = program.make()
            results = jax.eval_shape(function.function, *arguments)
            assert [result is not None for result in results] == [True, program.name == "entropies"]


def test_a_run_with_the_kl_in_its_rewards_has_a_program_for_the_advantages_of_its_update():
    loop = loop_programs(tiny("grpo.preset=reinforce++", "grpo.minibatches=2"), jax.devices())
    (program,) = (program for program in loop.programs if program.name == "token advantages")
    function, arguments = program.make()
    advantages, kl = jax.eval_shape(function.function, *arguments)
    batch = loop.inputs.minibatch.batch
    assert [(x.shape, x.dtype) for x in advantages] == [(batch.advantages_MRCL.shape, batch.advantages_MRCL.dtype)] * 2
    assert kl.shape == ()
    assert batch.reference_logprobs_MRCL is None
    assert batch.old_logprobs_MRCL is not None


def test_a_folder_without_weights_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "rms_norm_eps": 1e-6,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "eos_token_id": 7,
                "hidden_act": "silu",
            }
        )
    )
    config = tiny(f"model.source={tmp_path}", "grpo.beta=0.1")
    loop = loop_programs(config, jax.devices())
    assert [program.name for program in loop.programs if program.is_reported] == [
        n for n in NAMES if n != "reference init"
    ]
    assert loop.policy.config == model_shape(config, read_shape(config)[0], tmp_path)
    assert loop.policy.config.vocab_size == 300
    init, _ = loop.programs[0].make()
    assert jax.eval_shape(init.function).params == {}  # pretrained weights are read


# Models that are not the own decoder


OWN_MODULES = {"nnx": "gpt", "linen": "ssm"}


def own_module(flavour, *overrides):
    source = f"model.source={ROOT / 'examples/own_model' / OWN_MODULES[flavour]}.py:build"
    kept = [setting for setting in TINY if not setting.startswith("model.arch")]
    size = "model.args={hidden_size: 16, num_layers: 1}"
    return load_config(None, [*kept, source, size, f"pure_nnx={flavour == 'nnx'}".lower(), *overrides])


@contextlib.contextmanager
def compilations(caplog):
    """A list that holds afterwards what jax said of each program compiled meanwhile: its name, and the shapes, dtypes
    and shardings of its arguments.
    """
    said = []
    caplog.clear()
    with jax.log_compiles():
        yield said
    said += [text for text in (record.getMessage() for record in caplog.records) if text.startswith("Compiling ")]


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["linen", pytest.param("nnx", marks=pytest.mark.long)])
def test_a_module_of_ones_own_is_compiled_as_its_training_runs_it(flavour, tmp_path, caplog):
    config = own_module(flavour, f"output_dir={tmp_path / 'run'}")
    loop = loop_programs(config, jax.devices())
    assert [program.name for program in loop.programs] == NAMES
    functions = [program.make()[0].function for program in loop.programs]
    names = [f"Compiling jit({getattr(function, 'func', function).__name__}) " for function in functions]
    # Training finds again in the cache what was compiled ahead, which is said to be compiled all the same.
    with persistent_cache(tmp_path / "cache"), compilations(caplog) as ahead:
        report = CompileReport(loop, None, [compile_one(program)[0] for program in loop.programs])
    ahead = [text for text in ahead if text.startswith(tuple(names))]
    assert len(ahead) == len(loop.programs)
    with persistent_cache(tmp_path / "cache"), compilations(caplog) as during:
        train(config)
    assert not [text for text in ahead if text not in during]
    assert report.fits
    decode = next(program for program in report.programs if program.name == "decode")
    assert decode.work.unknown_loops == 0
    assert loop.resident.cache > 0
    assert "are left for keys and values; the configuration" in to_text(report)
    # Of what does not fit only keys are named that such a model has.
    scarce = CompileReport(dataclasses.replace(loop, memory=loop.resident.weights), None, report.programs)
    told = [line.partition(":")[0] for line in advice(scarce) if "=" in line.partition(":")[0]]
    assert "model.param_dtype=bfloat16" in told
    own_module(flavour, *(key for keys in told for key in keys.split()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of interfaces that Tunix 0.1.7 uses
def test_a_tunix_model_is_compiled_without_its_weights(tmp_path):
    raw = json.loads((MODELS / "qwen3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vocab_size": 259}))
    kept = [setting for setting in TINY if not setting.startswith("model.arch")]
    config = load_config(None, [*kept, f"model.source=tunix:{tmp_path}", "tokenizer.source=byte"])
    loop = loop_programs(config, jax.devices())
    reported = [program for program in loop.programs if program.is_reported]
    assert [program.name for program in reported] == [name for name in NAMES if name != "reference init"]
    report = compile_loop(
        dataclasses.replace(loop, programs=[p for p in reported if p.name in ("decode", "train step")])
    )
    assert report.fits
    assert all(program.work.flops > 0 for program in report.programs)
    init, _ = loop.programs[0].make()
    assert jax.eval_shape(init.function).params == {}


def test_programs_of_a_module_of_ones_own_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"--save must go with a model of the toolkit's own decoder.*gpt.py:build"):
        compile_config(own_module("nnx"), devices="cpu:8", save=str(tmp_path / "programs.bin"))


# What a program does, from its text


def compiled_on(mesh, function, *arguments, out=()):
    """Compiled for arguments of these shapes and shardings, its result whole on every device, or laid out as `out`."""
    return Program(function, tuple(s for _, s in arguments), NamedSharding(mesh, P(*out))).compile(
        tuple(a for a, _ in arguments)
    )


def array(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32), NamedSharding(mesh, P(*spec))


def test_flops_are_two_per_multiply_add_in_every_round_of_a_loop():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = array(mesh, (8, 32)), array(mesh, (5, 32, 32))

    def scanned(x, w):
        return jax.lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x, w)[0]

    work = work_of(compiled_on(mesh, scanned, x, w).as_text(), {})
    assert work.flops == 5 * 2 * 8 * 32 * 32
    assert work.unknown_loops == 0
    kernels, rows = 4 * 5 * 32 * 32, 4 * 5 * 8 * 32
    assert kernels + rows <= work.num_bytes <= 2 * kernels + 12 * rows


def test_a_loop_of_unknown_length_runs_as_often_as_its_name_says():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def looped(x, w, n):
        with jax.named_scope("pieces"):
            return jax.lax.fori_loop(0, n[0].astype(jnp.int32), lambda _, y: jnp.tanh(y @ w), x)

    text = compiled_on(mesh, looped, array(mesh, (8, 32)), array(mesh, (32, 32)), array(mesh, (1,))).as_text()
    once, often = work_of(text, {}), work_of(text, {"pieces": 7})
    assert (once.flops, once.unknown_loops) == (2 * 8 * 32 * 32, 1)
    assert (often.flops, often.unknown_loops) == (7 * once.flops, 0)


# A loop without XLA's own count of its rounds.
LOOP = """
%round (carry.1: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {{
  %carry.1 = (u32[], f32[8,8]{{1,0}}) parameter(0)
  %counter.1 = u32[] get-tuple-element(%carry.1), index=0
  %copy.1 = u32[] copy(%counter.1)
  %step.1 = u32[] constant({step})
  %next.1 = u32[] add(%copy.1, %step.1)
  %x.1 = f32[8,8]{{1,0}} get-tuple-element(%carry.1), index=1
  %dot.1 = f32[8,8]{{1,0}} dot(%x.1, %x.1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %tuple.1 = (u32[], f32[8,8]{{1,0}}) tuple(%next.1, %dot.1)
}}

%goes_on (carry.2: (u32[], f32[8,8])) -> pred[] {{
  %carry.2 = (u32[], f32[8,8]{{1,0}}) parameter(0)
  %counter.2 = u32[] get-tuple-element(%carry.2), index=0
  %limit.2 = u32[] constant({limit})
  ROOT %compare.2 = pred[] compare(%counter.2, %limit.2), direction=LT
}}

ENTRY %main (x.3: f32[8,8]) -> f32[8,8] {{
  %x.3 = f32[8,8]{{1,0}} parameter(0)
  %start.3 = u32[] constant({start})
  %tuple.3 = (u32[], f32[8,8]{{1,0}}) tuple(%start.3, %x.3)
  %while.3 = (u32[], f32[8,8]{{1,0}}) while(%tuple.3), condition=%goes_on, body=%round
  ROOT %result.3 = f32[8,8]{{1,0}} get-tuple-element(%while.3), index=1
}}
"""


@pytest.mark.parametrize(
    ("start", "step", "limit", "rounds"), [(0, 1, 7, 7), (0, 2, 16, 8), (1, 1, 4, 3), (1, 2, 4, 2)]
)
def test_rounds_of_a_loop_follow_from_where_it_starts_and_how_it_counts(start, step, limit, rounds):
    # A TPU's products that overlap with communication count by two, and loops whose first round is taken out from one.
    work = work_of(LOOP.format(start=start, step=step, limit=limit), {})
    assert (work.flops, work.unknown_loops) == (rounds * 2 * 8**3, 0)
    assert work_of(LOOP.format(start=start, step=0, limit=limit), {}).unknown_loops == 1


# A collective in three fusions, as XLA for TPU spreads it over the products beside it.
SHARD, WHOLE, MARK, SQUARE = "f32[4,8]{1,0}", "f32[16,8]{1,0}", "u32[]{:S(2)}", "f32[8,8]{1,0}"
SPREAD = f"""
%begin (p.1: f32[4,8]) -> (f32[4,8], f32[16,8], u32[]) {{
  %p.1 = {SHARD} parameter(0)
  %all-gather.1 = {WHOLE} all-gather(%p.1), channel_id=7, dimensions={{0}}
  ROOT %call.1 = ({SHARD}, {WHOLE}, {MARK}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%meanwhile (p.2: f32[4,8], q.2: f32[16,8], s.2: u32[], x.2: f32[8,8]) -> (f32[8,8], f32[4,8], f32[16,8], u32[]) {{
  %p.2 = {SHARD} parameter(0)
  %q.2 = {WHOLE} parameter(1)
  %s.2 = {MARK} parameter(2)
  %x.2 = {SQUARE} parameter(3)
  %dot.2 = {SQUARE} dot(%x.2, %x.2), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %all-gather.2 = {WHOLE} all-gather(%p.2), channel_id=7, dimensions={{0}}
  ROOT %tuple.2 = ({SQUARE}, {SHARD}, {WHOLE}, {WHOLE}, {MARK}) tuple(%dot.2, %p.2, %q.2, %all-gather.2, %s.2)
}}

%end (p.3: f32[4,8], q.3: f32[16,8], s.3: u32[]) -> f32[16,8] {{
  %p.3 = {SHARD} parameter(0)
  %q.3 = {WHOLE} parameter(1)
  %all-gather.3 = {WHOLE} all-gather(%p.3), channel_id=7, dimensions={{0}}
  %s.3 = {MARK} parameter(2)
  ROOT %call.3 = {WHOLE} custom-call(%p.3, %q.3, %all-gather.3, %s.3), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p.4: f32[4,8], x.4: f32[8,8]) -> (f32[8,8], f32[16,8]) {{
  %p.4 = {SHARD} parameter(0)
  %x.4 = {SQUARE} parameter(1)
  %begun.4 = ({SHARD}, {WHOLE}, {MARK}) fusion(%p.4), output_to_operand_aliasing={{{{0}}: (0, {{}})}}, calls=%begin
  %p.5 = {SHARD} get-tuple-element(%begun.4), index=0
  %q.5 = {WHOLE} get-tuple-element(%begun.4), index=1
  %s.5 = {MARK} get-tuple-element(%begun.4), index=2
  %meanwhile.5 = ({SQUARE}, {SHARD}, {WHOLE}, {WHOLE}, {MARK}) fusion(%p.5, %q.5, %s.5, %x.4), \
output_to_operand_aliasing={{{{1}}: (0, {{}}), {{2}}: (1, {{}}), {{3}}: (1, {{}}), {{4}}: (2, {{}})}}, calls=%meanwhile
  %y.6 = {SQUARE} get-tuple-element(%meanwhile.5), index=0
  %p.6 = {SHARD} get-tuple-element(%meanwhile.5), index=1
  %q.6 = {WHOLE} get-tuple-element(%meanwhile.5), index=3
  %s.6 = {MARK} get-tuple-element(%meanwhile.5), index=4
  %done.6 = {WHOLE} fusion(%p.6, %q.6, %s.6), output_to_operand_aliasing={{{{}}: (1, {{}})}}, calls=%end
  ROOT %tuple.6 = ({SQUARE}, {WHOLE}) tuple(%y.6, %done.6)
}}
"""


def test_a_collective_spread_over_the_fusions_that_compute_meanwhile_is_counted_once():
    work = work_of(SPREAD, {})
    assert work.collectives == {"all-gather": Collective(1, 4 * 16 * 8)}
    assert work.flops == 2 * 8**3
    shard, whole, matrix = 4 * 4 * 8, 4 * 16 * 8, 4 * 8 * 8
    assert work.num_bytes == shard + whole + 2 * matrix  # read and written where it begins, and by the product


def test_collectives_are_counted_with_what_a_device_receives():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = array(mesh, (16, 64), None, "x"), array(mesh, (64, 24), "x", None)
    work = work_of(compiled_on(mesh, lambda x, w: x @ w, x, w).as_text(), {})
    assert work.collectives == {"all-reduce": Collective(1, 4 * 16 * 24)}
    assert work.flops == 2 * 16 * 8 * 24
    gathered = work_of(compiled_on(mesh, lambda x: 2 * x, array(mesh, (16, 64), "x")).as_text(), {})
    assert gathered.collectives == {"all-gather": Collective(1, 4 * 16 * 64)}


def test_bytes_of_shapes_count_tuples_small_types_and_main_memory_only():
    assert array_bytes("(f32[2,3]{1,0}, bf16[4]{0}, pred[], s4[8])") == 24 + 8 + 1 + 4
    assert array_bytes("(f32[2]{0:T(8)S(1)}, f32[3]{0:T(8)})", main_memory_only=True) == 12


# The report


def test_every_program_of_the_loop_is_reported_and_the_run_fits(saved):
    _config, report, _ = saved
    assert [program.name for program in report.programs] == NAMES
    by_name = {program.name: program for program in report.programs}
    inputs = report.loop.inputs
    state = report.loop.resident.state + 4 + 16  # a step and a key beside weights and moments
    minibatch = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(inputs.minibatch))
    assert state <= by_name["train step"].arguments <= state + minibatch
    assert by_name["train step"].aliased >= report.loop.resident.state  # donated
    assert by_name["train step"].needed == by_name["train step"].peak + report.loop.resident.reference
    assert by_name["train step"].work.flops > 2.5 * by_name["logprobs"].work.flops > 0
    assert by_name["train step"].work.collectives
    assert by_name["decode"].work.num_bytes > 0
    assert report.fits
    assert not advice(report)
    assert set(json.loads(json.dumps(to_json(report)))["terms"]) >= {"weights", "optimizer state", "reference"}
    assert "fits: " in to_text(report)


def test_figures_of_the_report_are_those_worked_out_by_hand(saved):
    report = saved[1]
    decode = next(program for program in report.programs if program.name == "decode")
    # On fsdp=2 x tensor=2: 259 rows, which two do not divide; q, k, v, o; gate, up, down; norms, whole on each device.
    weights = 4 * (259 * 16 // 2 + 4 * (16 * 2 * 8) // 4 + 3 * (16 * 24) // 4 + 3 * 16 + 2 * 8)
    moments = 2 * weights + 2 * 4  # and the counts of the optimizer and of its schedule
    held = 2 * weights + moments  # the reference has weights of its own
    assert (report.loop.resident.weights, report.loop.resident.moments) == (weights, moments)
    ample, scarce = (
        CompileReport(dataclasses.replace(report.loop, memory=held + decode.temporaries + more), None, report.programs)
        for more in (12_345, -1)
    )
    assert (ample.kv_budget(), scarce.kv_budget()) == (12_345, 0)
    assert to_json(ample)["kv_budget"] == 12_345
    # Keys and values of a layer, heads on two devices; where and whose they are.
    position = 2 * (2 * 8 // 2) * 4 + 3 * 4
    assert report.loop.resident.bytes_per_position == position
    assert f"{12_345 // position:,} positions" in to_text(ample)
    chip = CHIPS["TPU v5 lite"]
    for program in to_json(CompileReport(report.loop, chip, report.programs))["programs"]:
        assert program["intensity"] == program["flops"] / program["bytes"]
        assert program["roofline_seconds"] == max(program["flops"] / 197e12, program["bytes"] / 819e9) > 0
    fast, slow = (dataclasses.replace(chip, flops=flops) for flops in (1e30, 1.0))  # bound by memory, by products
    step = next(program for program in report.programs if program.name == "train step").work
    assert roofline(step, fast) == step.num_bytes / chip.bandwidth
    assert roofline(step, slow) == step.flops
    assert roofline(step, None) is None


def test_a_folder_in_place_of_a_recipe_is_refused_with_the_recipe_in_it(tmp_path):
    with pytest.raises(ValueError, match=rf"a config must be a YAML recipe, got the folder '{tmp_path}'; name a file$"):
        main([str(tmp_path)])
    (tmp_path / "config.yml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match=rf"got the folder '{tmp_path}'; name '{tmp_path}/config\.yml'$"):
        main([str(tmp_path)])


def test_the_command_fails_for_a_run_that_does_not_fit_and_writes_what_it_says(tmp_path, monkeypatch, capsys):
    one = ("mesh.num_devices=1", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", "grpo.beta=0")
    memory, sysconf = 2**16, os.sysconf
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory * jax.local_device_count()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "sysconf", lambda name: sizes[name] if name in sizes else sysconf(name))
        status = main(["base.yml", "--devices", "cpu:1", "--json", str(tmp_path / "report.json"), *TINY, *one])
    found, text = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert (status, found["fits"], found["memory"]) == (1, False, memory)
    programs = {program["name"]: program for program in found["programs"]}
    assert set(programs) == {"state init", "prefill", "decode", "train step"}
    step = programs["train step"]
    assert step["needed"] == step["peak"] > memory  # no reference beside it
    assert step["peak"] == step["arguments"] + step["outputs"] - step["aliased"] + step["temporaries"]
    assert step["intensity"] == step["flops"] / step["bytes"]
    assert found["terms"]["weights"] == found["resident"]["weights"]
    assert "does not fit: train step needs" in text
    assert found["advice"]
    assert all(f"change:  {line}" in text for line in found["advice"])


def test_a_program_whose_text_jaxlib_cannot_read_is_reported_without_its_operations(saved, monkeypatch):
    """As with what libtpu 0.0.52 compiles for v5p, in jaxlib 0.10."""
    loop = saved[1].loop
    program = next(p for p in loop.programs if p.name == "reference init")

    def as_text(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Compiled, "as_text", as_text)
        found, compiled = compile_one(program)
    assert compiled is not None
    assert found.work is None
    assert found.peak > found.outputs > 0
    report = CompileReport(loop, None, [found, *(p for p in saved[1].programs if p.name != found.name)])
    assert report.fits
    assert "flops" not in to_json(report)["programs"][0]
    told = "operations of reference init are not counted, jaxlib cannot read them: INTERNAL: async-update"
    assert told in to_text(report)
    assert "more" not in found.unread


def test_what_does_not_fit_is_named_with_keys_to_change(saved):
    report = saved[1]
    small = dataclasses.replace(report.loop, memory=report.worst.needed - 1)
    told = advice(short := CompileReport(small, None, report.programs))
    assert not short.fits
    assert "does not fit: train step" in to_text(short)
    assert any(line.startswith("model.remat=block") for line in told)
    scarce = CompileReport(dataclasses.replace(report.loop, memory=report.loop.resident.state), None, report.programs)
    assert {"grpo.beta=0", "lora.rank=16"} <= {line.split(":")[0] for line in advice(scarce)}
    keys = [line.partition(":")[0] for line in told + advice(scarce) if "=" in line.partition(":")[0]]
    load_config(None, [key for line in keys for key in line.split()])  # each is a key with a value that it takes


def test_the_first_piece_of_advice_makes_a_run_fit(saved):
    config, report, _ = saved
    assert report.worst.name == "train step"

    def without(memory: int) -> CompileReport:
        return CompileReport(dataclasses.replace(report.loop, memory=memory), None, report.programs)

    key = advice(without(report.worst.needed - 1))[0].partition(":")[0]
    other = tiny(*key.split(), flavour="nnx" if config.pure_nnx else "linen")
    loop = loop_programs(other, jax.devices(), report.loop.memory)
    step = next(program for program in loop.programs if program.name == report.worst.name)
    changed = compile_one(step)[0]
    memory = (report.worst.needed + changed.needed) // 2
    assert changed.needed < memory < report.worst.needed
    assert not without(memory).fits
    assert advice(without(memory))[0].partition(":")[0] == key
    assert CompileReport(dataclasses.replace(loop, memory=memory), None, [changed]).fits


def test_advice_is_in_the_order_of_what_it_saves():
    """Of 70B on 256 chips, as docs/compile.md tells it: with two devices on tensor it needed 12.31 GiB."""
    pytest.importorskip("libtpu")
    config = load_config(ROOT / "examples/aot/llama3.1_70b.yml", ["grpo.max_tokens_per_microbatch=393216"])
    loop = loop_programs(config, find_devices("v5e:16x16", 1, None), CHIPS["TPU v5 lite"].memory)
    needed, temporaries = int(15.37 * 2**30), int(11.75 * 2**30)
    peak = needed - loop.resident.reference
    step = ProgramReport("train step", peak - temporaries, 0, 0, temporaries, peak, needed, None, 0.0, 0)
    told = advice(CompileReport(loop, None, [step]))
    assert [line.partition(":")[0] for line in told] == ["mesh.tensor=2", "model.remat=full", "grpo.logprob_chunk=96"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v5e:2x2", 1, "cpu:2"), "must not be given together"),
        ((None, 2, None), "only with --topology"),
        (("v5e-4", 1, None), "must look like v5e:4x4"),
        ((None, 1, "gpu:2"), "must be cpu:N"),
        ((None, 1, "cpu:9"), "got 8; set XLA_FLAGS"),
    ],
)
def test_devices_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_devices(*arguments)


# The file


def measured(metrics):
    """What training computed, without times and memory."""
    told = ("seconds", "tokens_per_second", "compiles", "peak_memory")
    return [{k: v for k, v in line.items() if not k.startswith(told) and "/seconds_" not in k} for line in metrics]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The metrics of the run without a file, in NNX; those in Linen are the same."""
    config = dataclasses.replace(tiny(), output_dir=str(tmp_path_factory.mktemp("plain") / "run"))
    train(config)
    return read_metrics(config.output_dir)


def test_programs_to_save_do_not_come_out_of_the_persistent_cache(tmp_path):
    loop = loop_programs(tiny(), jax.devices())
    loop = dataclasses.replace(loop, programs=loop.programs[:1])

    def cached():
        return [path for path in (tmp_path / "cache").glob("jit_init*") if path.name.endswith("-cache")]

    with persistent_cache(tmp_path / "cache"):
        compile_loop(loop)
        (entry,) = cached()
        entry.unlink()
        jax.clear_caches()
        compile_loop(loop, save=str(tmp_path / "programs.bin"))
        assert not cached()
    assert set(read_file(tmp_path / "programs.bin")[1]) == {loop.programs[0].key}


class Unserialisable:
    def serialize(self):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: Serializing executables is not supported")


def without_executable(compiled):
    raise NotImplementedError("compiled executable carries no runtime executable")


@pytest.mark.parametrize(
    ("runtime_executable", "message"),
    [
        (lambda compiled: Unserialisable(), "UNIMPLEMENTED: Serializing executables is not supported"),
        (without_executable, "compiled executable carries no runtime executable"),
        (lambda compiled: None, "it has no executable of its own"),
    ],
)
def test_what_a_back_end_cannot_serialise_is_not_saved(tmp_path, monkeypatch, runtime_executable, message):
    loop = loop_programs(tiny(), jax.devices())
    loop = dataclasses.replace(loop, programs=loop.programs[:1])
    monkeypatch.setattr(jax.stages.Compiled, "runtime_executable", runtime_executable)
    told = rf"--save must have a back end that serialises .* not for 'state init': {message}; leave --save out"
    with pytest.raises(ValueError, match=told):
        compile_loop(loop, save=str(tmp_path / "programs.bin"))
    assert not list(tmp_path.iterdir())


def test_a_program_that_calls_python_is_not_saved(tmp_path, monkeypatch):
    """The runtime would serialise it, with an address of this process in it: another one crashes on that."""
    config = tiny()
    mesh, policy, _ = parts_of(config)
    everywhere = NamedSharding(mesh, P())

    def told(x):
        jax.debug.print("{x}", x=x)
        return x + 1

    program = Program(told, (everywhere,), everywhere)
    arguments = (jax.ShapeDtypeStruct((2,), jnp.float32),)
    saving = [("told", program, arguments, program.compile(arguments))]
    message = "'told' calls Python .*leave --save out"
    with pytest.raises(ValueError, match=message):
        save_compiled(tmp_path / "programs.bin", config, policy, mesh, 1, saving)

    def as_text(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    with pytest.raises(ValueError, match=message):
        save_compiled(tmp_path / "programs.bin", config, policy, mesh, 1, saving)
    assert not list(tmp_path.iterdir())


def test_nothing_is_pickled_while_programs_are_saved_loaded_and_called(saved, tmp_path, monkeypatch):
    config, report, path = saved
    loop = dataclasses.replace(report.loop, programs=report.loop.programs[:1])

    def refuse(*arguments, **settings):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("serialize", "deserialize_and_load"):
        monkeypatch.setattr(serialize_executable, name, refuse)
    compile_loop(loop, save=str(tmp_path / "programs.bin"))
    names = {loop.programs[0].key: tmp_path / "programs.bin", "train step": path}
    programs = {program.key: program.make()[0] for program in report.loop.programs if program.key in names}
    for name, file in names.items():
        opened = open_compiled(dataclasses.replace(config, compiled_file=str(file)), *parts_of(config)[1::-1])
        call = opened.get(name, programs[name])
        assert isinstance(call, LoadedProgram)
        if name == "state init":
            assert int(call().step) == 0


def test_transfers_between_slices_are_saved_and_calls_of_python_are_not(tmp_path):
    pytest.importorskip("libtpu")
    config = tiny("mesh.data=2", "mesh.fsdp=4", "mesh.tensor=1")
    mesh, policy = create_mesh(config.mesh, find_devices("v5e:2x2", 2, None)), parts_of(tiny())[1]
    rows, everywhere = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())

    def summed(x):
        return jnp.sum(x, axis=0)  # over both slices

    def told(x):
        jax.debug.print("{x}", x=x[0, 0])
        return jnp.sum(x, axis=0)

    def save(function):
        program, arguments = Program(function, (rows,), everywhere), (jax.ShapeDtypeStruct((8, 16), jnp.float32),)
        compiled = program.compile(arguments)
        assert '"xla_megascale_runtime"' in compiled.as_text()
        save_compiled(tmp_path / "programs.bin", config, policy, mesh, 1, [("sum", program, arguments, compiled)])

    with pytest.raises(ValueError, match=r"'sum' calls Python"):
        save(told)
    assert not list(tmp_path.iterdir())
    save(summed)
    assert set(read_file(tmp_path / "programs.bin")[1]) == {"sum"}


@pytest.mark.slow
def test_training_with_compiled_programs_gives_what_training_without_gives(saved, plain, tmp_path):
    config, _, path = saved
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({}))
    # In a process of its own: nothing of what was compiled here is there.
    command = [sys.executable, "-m", "rl.grpo_trainer", str(recipe), *TINY, f"pure_nnx={str(config.pure_nnx).lower()}"]
    command += [f"output_dir={tmp_path / 'compiled'}", f"compiled_file={path}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    compiled = read_metrics(tmp_path / "compiled")
    assert measured(compiled) == measured(plain)
    assert compiled[0]["grad_norm"] > 0
    assert compiled[0]["compiles"] < plain[0]["compiles"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1e-3", r"optimizer.lr must be 0.001, got 1e-06"),
        ("sampling.max_completion_length=5", r"sampling.max_completion_length must be 5, got 4"),
        ("data.max_prompt_length=6", r"data.max_prompt_length must be 6, got 5"),
        ("mesh={data: 1, fsdp: 4}", r"mesh must be \{'data': 1, 'fsdp': 4, 'tensor': 2\}, got .*'fsdp': 2"),
        ("mesh={num_devices: 1, data: 1, fsdp: 1, tensor: 1}", r"num_devices must be 1, got 8"),
        ("seed=1", r"seed must be 1, got 0"),
        ("model.arch.hidden_size=32", r"model must be .*'hidden_size': 32.*got .*'hidden_size': 16"),
    ],
)
def test_a_file_compiled_for_another_run_is_refused_with_the_field(saved, override, message):
    config, _, path = saved
    other = tiny(override, f"compiled_file={path}", flavour="nnx" if config.pure_nnx else "linen")
    mesh, policy, _ = parts_of(other)
    with pytest.raises(ValueError, match=message):
        open_compiled(other, policy, mesh)


@pytest.mark.parametrize(
    "field",
    [
        *("jax", "jaxlib", "libtpu", "platform", "device_kind", "num_devices", "device_ids", "host_cpu"),
        *("config_hash", "x64"),
    ],
)
def test_a_file_compiled_with_something_else_is_refused_with_the_field(saved, tmp_path, field):
    config, _, path = saved
    other = rewritten(path, tmp_path, lambda header: header["made_for"].update({field: "other"}))
    with pytest.raises(ValueError, match=rf"{field} must be .*, got 'other'"):
        open_compiled(dataclasses.replace(config, compiled_file=str(other)), *parts_of(config)[1::-1])


def test_a_file_compiled_with_another_loss_or_another_tandem_is_refused(saved, tmp_path, monkeypatch):
    config, mesh, policy = saved[0], *parts_of(saved[0])[:2]
    file = tmp_path / "my_losses.py"
    file.write_text("def own(*inputs): return 1\n")
    own = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, loss_type=f"{file}:own"))
    before = fingerprint(own, policy, mesh)
    assert before == fingerprint(own, policy, mesh)
    file.write_text("def own(*inputs): return 2\n")
    assert [name for name, value in fingerprint(own, policy, mesh).items() if before[name] != value] == [
        "file of grpo.loss_type"
    ]
    monkeypatch.setattr("rl.run.executables._code_hash", lambda: "another")
    with pytest.raises(ValueError, match="code of the toolkit must be 'another', got"):
        open_compiled(dataclasses.replace(config, compiled_file=str(saved[2])), policy, mesh)


def test_another_advantage_function_needs_no_other_programs(saved, tmp_path):
    config, _, path = saved
    file = tmp_path / "my_advantages.py"
    own = dataclasses.replace(
        config,
        grpo=dataclasses.replace(config.grpo, advantage_estimator=f"{file}:own"),
        compiled_file=str(path),
    )
    for content in ("def own(*inputs): return 1\n", "def own(*inputs): return 2\n"):
        file.write_text(content)
        assert open_compiled(own, *parts_of(own)[1::-1]).executables


def test_the_report_counts_weights_of_the_rollouts_and_moments_on_the_devices_only():
    devices = find_devices(None, 1, "cpu:8")
    plain, quantised, spread, offloaded = (
        loop_programs(tiny(*overrides), devices, None).resident
        for overrides in (
            (),
            ("sampling.weight_dtype=int8",),
            ("mesh.rollout_rules={embed: []}",),
            ("optimizer.offload=true",),
        )
    )
    assert plain.copy == 0
    assert 0 < quantised.copy < plain.weights < spread.copy
    assert plain.moments > plain.weights
    assert offloaded.moments < plain.moments / 100


def test_a_program_with_other_arguments_is_refused_with_the_argument(saved, tmp_path):
    config, report, path = saved
    changed = "float32[3] of [3]"

    def change(header):
        header["programs"]["logprobs"]["arguments"]["[0]['norm']['scale']"] = changed

    other = rewritten(path, tmp_path, change)
    programs = open_compiled(dataclasses.replace(config, compiled_file=str(other)), *parts_of(config)[1::-1])
    (program, arguments) = next(p for p in report.loop.programs if p.name == "logprobs").make()
    with pytest.raises(ValueError, match=r"\['norm'\]\['scale'\] must be 'float32\[16\] of \[16\]', got 'float32\[3\]"):
        programs.get("logprobs", program)(*jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arguments))


def test_damaged_files_are_refused(saved, tmp_path):
    path = saved[2]
    whole = path.read_bytes()
    middle = len(MAGIC) + 100
    damages = {
        "header": (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "its header does not have"),
        "program": (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "program 'train step' does not have"),
        "end": (whole[:-100], "program 'train step' does not have"),
        "other": (b"something else", "must begin with"),
    }
    for name, (content, message) in damages.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / name)
    with pytest.raises(ValueError, match="not there"):
        read_file(tmp_path / "nothing")


def rewritten(path, folder, change):
    """The file with another header, and the checksum that belongs to it."""
    whole = path.read_bytes()
    start = len(MAGIC) + 40
    size = int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 8], "little")
    header = json.loads(whole[start : start + size])
    change(header)
    text = json.dumps(header).encode()
    result = folder / "rewritten.bin"
    head = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    result.write_bytes(head + whole[start + size :])
    return result


# TPUs that are not there


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ONE_FLAVOUR)  # the command below compiles Linen's
def test_the_train_step_compiles_for_a_tpu_that_is_not_there(flavour):
    pytest.importorskip("libtpu")
    config = tiny(*FOUR, "model.dtype=bfloat16", flavour=flavour)
    chip = CHIPS["TPU v5 lite"]
    loop = loop_programs(config, find_devices("v5e:2x2", 1, None), chip.memory)
    assert [program.name for program in loop.programs if program.is_reported] == NAMES
    kept = [program for program in loop.programs if program.name == "train step"]
    report = compile_loop(dataclasses.replace(loop, programs=kept))
    assert report.chip == chip
    assert report.fits
    (step,) = report.programs
    model, plan = loop.policy.config, loop.inputs.plan
    layers = model.num_layers * model.hidden_size * (4 * model.hidden_size + 3 * model.intermediate_size)
    tokens = plan.num_microbatches * plan.num_rows * plan.row_length
    assert step.work.flops > 6 * layers * tokens / loop.mesh.size  # forward, and twice that for backward
    assert step.work.num_bytes > loop.resident.state  # every weight and moment is read at least
    assert step.work.collectives
    assert to_json(report)["programs"][0]["roofline_seconds"] > 0


@pytest.mark.slow
def test_the_command_compiles_every_program_for_two_slices_and_saves_them(tmp_path):
    pytest.importorskip("libtpu")
    recipe, told, file = tmp_path / "recipe.yml", tmp_path / "report.json", tmp_path / "programs.bin"
    recipe.write_text("pure_nnx: false\n")
    arguments = ["compile", recipe, "--topology", "v5e:2x2", "--slices", 2, "--json", told, "--save", file, *TINY]
    status = grpo([*map(str, arguments)])
    header, executables = read_file(file)
    made_for = header["made_for"]
    assert (made_for["platform"], made_for["device_kind"], made_for["num_devices"]) == ("tpu", "TPU v5 lite", 8)
    assert made_for["libtpu"] is not None
    assert set(executables) >= {"state init", "reference init", "logprobs", "train step"}
    assert all(executables.values())
    report = json.loads(told.read_text())
    assert (status, report["fits"]) == (0, True)
    assert (report["devices"], report["num_slices"], report["chip"]["name"]) == (8, 2, "v5e")
    assert [program["name"] for program in report["programs"]] == NAMES
    for program in report["programs"]:
        assert (program["refused"], program["unread"]) == (None, None)
        assert 0 < program["peak"] <= program["needed"] <= report["memory"]
        assert program["bytes"] > 0
        assert program["roofline_seconds"] == max(program["flops"] / 197e12, program["bytes"] / 819e9)
    between = [kind for program in report["programs"] for kind in program["collectives"] if "between slices" in kind]
    assert between  # the copies along data are in different slices


@pytest.mark.slow
def test_decoding_on_tpus_computes_products_of_large_matrices_whole():
    """Left to itself the compiler makes some of them loops over shards."""
    pytest.importorskip("libtpu")
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128}
    arch = {**sizes, "vocab_size": 1024, "num_layers": 1}
    mesh = ("mesh.data=1", "mesh.fsdp=16", "mesh.tensor=8", "grpo.max_tokens_per_microbatch=4096")
    config = tiny(f"model.arch={json.dumps(arch)}", "model.dtype=bfloat16", *mesh)
    loop = loop_programs(config, find_devices("v5p:4x4x8", 1, None), CHIPS["TPU v5"].memory)
    _, compiled = compile_one(next(p for p in loop.programs if p.name == "decode" and p.is_reported))
    loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
    assert loops
    assert not [line for line in loops if "dot_general" in line]


def test_what_crosses_the_network_between_slices_is_counted_apart():
    pytest.importorskip("libtpu")
    section = load_config(None, ["mesh.data=2", "mesh.fsdp=4"]).mesh
    mesh = create_mesh(section, find_devices("v5e:2x2", 2, None))
    x, w = array(mesh, (64, 1024), ("data", "fsdp"), None), array(mesh, (1024, 1024), "fsdp", None)
    compiled = compiled_on(mesh, jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), w, x, out=("fsdp",))
    collectives = work_of(compiled.as_text(), {}).collectives
    # A device's quarter of the gradient is added up over both slices.
    assert collectives["all-reduce between slices"] == Collective(1, 4 * 1024 * 1024 // 4)
    assert "all-gather" in collectives


@pytest.mark.slow
def test_what_the_compiler_finds_too_large_is_reported(tmp_path):
    pytest.importorskip("libtpu")
    overrides = [
        "model.arch.hidden_size=16384",
        "model.arch.vocab_size=300000",
        "mesh.fsdp=1",
        "mesh.data=-1",
        "mesh.tensor=1",
    ]
    config = tiny(*overrides)
    loop = loop_programs(config, find_devices("v5e:2x2", 1, None), CHIPS["TPU v5 lite"].memory)
    report, compiled = compile_one(next(p for p in loop.programs if p.name == "logprobs"))
    assert compiled is None
    assert report.needed > loop.memory
    assert "memory" in report.refused.lower()
    file, lines = tmp_path / "programs.bin", []
    loop = dataclasses.replace(loop, programs=[next(p for p in loop.programs if p.name == "logprobs")])
    assert not compile_loop(loop, str(file), lines.append).fits
    assert not file.exists()
    assert lines[-1] == "nothing is saved: all programs must fit, and logprobs does not"
    told = advice(CompileReport(loop, CHIPS["TPU v5 lite"], [report]))
    assert any(line.startswith("mesh.data=1 mesh.fsdp=-1") for line in told)


@pytest.mark.parametrize(
    ("name", "slices", "number", "kind"),
    [("v5p:2x2x1", 1, 4, "TPU v5"), ("v6e:2x2", 2, 8, "TPU v6 lite"), ("v4:2x2x1", 1, 4, "TPU v4")],
)
def test_topologies_are_chips_that_are_known(name, slices, number, kind):
    pytest.importorskip("libtpu")
    devices = find_devices(name, slices, None)
    assert len(devices) == number
    assert {device.device_kind for device in devices} == {kind} <= set(CHIPS)
    assert num_slices(devices) == slices
    indices = [getattr(device, "slice_index", 0) for device in devices]  # devices of a single slice have none
    assert indices == sorted(indices)


def test_a_topology_that_libtpu_does_not_know_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="must be one that libtpu knows"):
        find_devices("v5e:3x7", 1, None)
    with pytest.raises(ValueError, match="must be one that libtpu knows"):
        main(["base.yml", "--topology", "v5e:3x7", "mesh.tensor=2"])
