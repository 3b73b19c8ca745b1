"""Where every leaf of the state and of the inputs lies is what the goldens say: `python -m
tests.helpers.sharding_golden`.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from rl.config.load import load_config
from rl.config.sections import Config
from rl.devices.mesh import axis_sizes, check_sharded, create_mesh, partition_spec, tree_shardings
from rl.models.config import ModelConfig
from rl.models.flavours import policy_from_config
from rl.state.optimizer import create_training_optimizer
from rl.state.origin import _lora as lora_of
from rl.state.states import InitStateFn, get_abstract_state
from rl.tools.programs.loop_programs import loop_programs, read_shape
from rl.training.packing import Batch
from rl.training.train_step import batch_shardings
from tests.helpers.places import ROOT
from tests.helpers.sharding_golden import BATCH, CASES, Case, describe, differences, path_of, to_text

REGENERATE = "python -m tests.helpers.sharding_golden"


def inputs_of(name):
    """Paths of a case's inputs that are cut by rows: either the reference's log-probs, or advantages of tokens and the
    ids that could be drawn.
    """
    left_out = {"reference_logprobs_MRCL"} if name == "kl_in_reward" else {"advantages_MRCL", "kept_words_MRNX"}
    return [f"minibatch.batch.{field}" for field in Batch._fields if field not in {"num_microbatches", *left_out}]


@pytest.mark.matrix
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("name", CASES)
def test_shardings_are_those_of_the_golden(name, flavour):
    path = path_of(name)
    assert path.is_file(), f"{path} is missing; {REGENERATE} writes it"
    now = describe(CASES[name], flavour)
    lines = differences(json.loads(path.read_text()), now)
    assert not lines, f"{len(lines)} differences to {path}; if they are meant, {REGENERATE}\n" + "\n".join(lines[:40])
    if flavour == "nnx":  # and what would be written is what is there, to the byte
        assert path.read_text() == to_text(now)


def test_every_golden_belongs_to_a_case():
    files = {path.name for path in path_of("any").parent.glob("sharding_*.json")}
    assert files == {path_of(name).name for name in CASES}


def test_differences_name_leaf_and_field():
    golden = json.loads(path_of("odd_vocabulary").read_text())
    other = json.loads(path_of("odd_vocabulary").read_text())
    path = "state.params['embed_tokens']['embedding']"
    other["leaves"][path]["spec"] = ["tensor", "fsdp"]
    other["leaves"]["minibatch.batch.mask_MRCL"]["logical"] = [None, None, "batch", None]
    other["leaves"]["state.params['extra']"] = other["leaves"].pop("state.rng")
    assert differences(golden, other) == [
        f"{path}: spec was [None, 'fsdp'], is ['tensor', 'fsdp']",
        "state.rng: is gone",
        "minibatch.batch.mask_MRCL: logical was [None, 'batch', None, None], is [None, None, 'batch', None]",
        "state.params['extra']: is new",
    ]


def test_every_leaf_of_state_and_minibatch_has_logical_and_physical_axes_per_dim():
    for name in CASES:
        leaves = json.loads(path_of(name).read_text())["leaves"]
        assert {"state.step", "minibatch.on_policy", *inputs_of(name)} <= set(leaves)
        for path, leaf in leaves.items():
            assert len(leaf["logical"]) == len(leaf["spec"]) == len(leaf["shape"]) == len(leaf["on_one_device"]), path


@pytest.mark.parametrize("name", ["odd_vocabulary", "kl_in_reward"])
def test_inputs_follow_the_rule_of_their_logical_axis(name):
    case = CASES[name]
    elsewhere = dataclasses.replace(case, overrides=(*case.overrides, "mesh.rules.batch=[tensor]"))
    usual, moved = (describe(case, "nnx")["leaves"] for case in (case, elsewhere))
    for path in inputs_of(name):
        assert (usual[path]["logical"], usual[path]["spec"][1]) == (moved[path]["logical"], ["data", "fsdp"])
        assert moved[path]["spec"] == ["tensor" if name == "batch" else None for name in moved[path]["logical"]]


@pytest.mark.parametrize("name", ["qwen3_8b_fsdp8", "llama_70b_v5e_16x16", "llama_70b_two_slices"])
def test_goldens_share_the_state_evenly(name):
    """All but norms and counts is cut over the whole of fsdp x tensor."""
    golden = json.loads(path_of(name).read_text())
    num_devices = math.prod(size for axis, size in golden["mesh"].items() if axis != "data")
    leaves = [leaf for path, leaf in golden["leaves"].items() if path.startswith("state")]
    everywhere = sum(math.prod(leaf["shape"]) for leaf in leaves)
    on_one = sum(math.prod(leaf["on_one_device"]) for leaf in leaves)
    assert everywhere / num_devices <= on_one < 1.01 * everywhere / num_devices


# The mesh that a golden describes, made of devices


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_a_real_mesh_gives_the_specs_of_the_golden(flavour):
    case = CASES["odd_vocabulary"]
    config = load_config(None, [f"pure_nnx={str(flavour == 'nnx').lower()}", *case.overrides])
    policy = policy_from_config(config, ModelConfig.from_arch(*case.arch, tie_word_embeddings=False))
    init_state_fn = InitStateFn(policy, create_training_optimizer(config, policy)[1], 0)
    abstract = get_abstract_state(config, create_mesh(config.mesh), init_state_fn)
    golden = json.loads(path_of("odd_vocabulary").read_text())["leaves"]
    shardings = jax.tree.leaves(abstract.shardings)
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(abstract.shapes), shardings, strict=True):
        want = golden[f"state{jax.tree_util.keystr(path)}"]
        assert len(sharding.device_set) == 8
        assert [list(leaf.shape), str(leaf.dtype)] == [want["shape"], want["dtype"]], path
        assert list(sharding.shard_shape(leaf.shape)) == want["on_one_device"], path
    golden = json.loads(path_of("kl_in_reward").read_text())["leaves"] | golden
    for name, sharding in batch_shardings(create_mesh(config.mesh), config.mesh.rules)._asdict().items():
        want = golden[f"minibatch.batch.{name}"]
        assert list(sharding.shard_shape(tuple(want["shape"]))) == want["on_one_device"], name


# Nothing large is whole on every device by accident


def check(*overrides: str, arch=("qwen3", 1024, 512, 1536, 1, 8, 8, 64)) -> None:
    config = load_config(None, overrides)
    check_state(config, ModelConfig.from_arch(*arch), create_mesh(config.mesh))


def check_state(config: Config, model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    policy = policy_from_config(config, model_config)
    init_state_fn = InitStateFn(policy, create_training_optimizer(config, policy)[1], 0)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    check_sharded(abstract.shapes, abstract.shardings, config.mesh, mesh)


def abstract_mesh(config: Config, num_devices: int | None = None) -> AbstractMesh:
    """The mesh of so many devices; None: as many as its sizes say, 1 for one that is open."""
    sizes = axis_sizes(config.mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: (num_devices or fixed) // fixed if size == -1 else size for axis, size in sizes.items()}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize(
    "overrides",
    [
        ("mesh.fsdp=8",),
        ("mesh.fsdp=2", "mesh.tensor=4"),
        ("mesh.data=8", "mesh.fsdp=1"),  # all whole, by design
        ("mesh.num_devices=1",),
        ("mesh.fsdp=8", "mesh.rules.embed=[]", "mesh.max_unsharded_share=1"),
    ],
)
def test_a_state_that_is_shared_as_it_should_be_passes(overrides):
    check(*overrides)


def test_large_arrays_that_are_whole_everywhere_end_the_start_and_are_named():
    message = (
        r"mesh\.max_unsharded_share must be at least .* 0\.875 on the mesh data=1 fsdp=8 tensor=1, got 0\.1; "
        r"largest of \d+ such arrays: .*\['mlp'\]\['(up|gate|down)_proj'\]\['kernel'\] \(3\.0 MiB\)"
    )
    with pytest.raises(ValueError, match=message):
        check("mesh.fsdp=8", "mesh.rules.embed=[]")


def test_compiling_ahead_of_time_refuses_what_training_refuses():
    shape = (
        "hidden_size=512",
        "intermediate_size=1536",
        "num_layers=1",
        "num_heads=8",
        "num_kv_heads=8",
        "head_dim=64",
    )
    arch = ["data.max_prompt_length=64", *(f"model.arch.{setting}" for setting in shape)]
    assert loop_programs(load_config(None, [*arch, "mesh.fsdp=8"]), jax.devices(), 2**30).programs
    with pytest.raises(ValueError, match=r"mesh\.max_unsharded_share must be at least"):
        loop_programs(load_config(None, [*arch, "mesh.fsdp=8", "mesh.rules.embed=[]"]), jax.devices(), 2**30)


def test_an_axis_that_divides_nothing_is_seen():
    with pytest.raises(ValueError, match=r"that other devices hold as well, 0\.857 on the mesh data=1 fsdp=7 tensor=1"):
        check("mesh.num_devices=7", "mesh.fsdp=7")


def test_small_arrays_may_be_whole():
    check("mesh.fsdp=8", "mesh.rules.embed=[]", arch=("qwen3", 64, 32, 64, 1, 2, 2, 16))


def one_array(shape, *axes: str | None, overrides=("mesh.fsdp=64", "mesh.tensor=4")):
    """Checks a float32 array, with these logical axes, on a mesh of these sizes beside nothing else."""
    section = load_config(None, overrides).mesh
    mesh = abstract_mesh(load_config(None, overrides))
    leaf = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    check_sharded(leaf, tree_shardings(leaf, {"kernel": axes}, mesh, section.rules), section, mesh)
    return partition_spec(axes, shape, mesh, section.rules)


def test_an_array_that_one_axis_cuts_and_another_copies_is_seen():
    message = (
        r"that other devices hold as well, 0\.984 on the mesh data=1 fsdp=64 tensor=4, got 0\.1; "
        r"largest of 1 such arrays: \['kernel'\] \(64\.1 MiB\), each on one device"
    )
    with pytest.raises(ValueError, match=message):
        one_array((4100, 16_384), "embed", "mlp")  # 64 does not divide 4100: 64 copies of each quarter
    assert one_array((4096, 16_384), "embed", "mlp") == P("fsdp", "tensor")
    with pytest.raises(ValueError, match=r"0\.750 on the mesh data=1 fsdp=64 tensor=4"):
        one_array((16_384, 4096), "embed", None)  # no rule gives the tensor axis a dim
    assert one_array((4100, 128), "embed", "mlp") == P(None, "tensor")  # a device holds less than a MiB of it


def test_axes_that_only_rows_are_spread_over_may_hold_copies():
    own = ("mesh.fsdp=4", "mesh.axes={context: 4}")
    with pytest.raises(ValueError, match=r"0\.750 on the mesh data=1 fsdp=4 context=4 tensor=1"):
        one_array((4096, 4096), "embed", "mlp", overrides=own)
    one_array((4096, 4096), "embed", "mlp", overrides=(*own, "mesh.rules.batch=[data, fsdp, context]"))
    with pytest.raises(ValueError, match=r"0\.750 on the mesh"):  # the heads are cut by it, so all should be
        one_array(
            *((4096, 4096), "embed", "mlp"),
            overrides=(*own, "mesh.rules.batch=[data, fsdp, context]", "mesh.rules.heads=[context]"),
        )


@pytest.mark.parametrize("name", CASES)
def test_meshes_of_the_goldens_leave_nothing_large_whole(name):
    case = CASES[name]
    # The rules of this one keep parameters off the axis fsdp, which has rows alone, and say so.
    meant = {"own_axis_and_rules": ("mesh.max_unsharded_share=0.71",)}.get(name, ())
    config = load_config(None, [*BATCH, *case.overrides, *meant])
    model_config = ModelConfig.from_arch(*case.arch, tie_word_embeddings=not case.untied)
    check_state(config, dataclasses.replace(model_config, lora=lora_of(config, model_config)), abstract_mesh(config))
    if meant:
        config = load_config(None, [*BATCH, *case.overrides])
        with pytest.raises(ValueError, match=r"mesh\.max_unsharded_share must be at least"):
            check_state(config, model_config, abstract_mesh(config))


def test_meshes_of_the_recipes_to_compile_leave_nothing_large_whole():
    path = ROOT / "examples" / "aot" / "table.py"
    spec = importlib.util.spec_from_file_location("aot_table", path)
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    seen = set()
    for case in table.CASES:
        overrides = [text for text in case.command(pathlib.Path("report.json")) if "=" in text]
        # Two layers stand for all.
        config = load_config(path.with_name(f"{case.recipe}.yml"), [*overrides, "model.arch.num_layers=2"])
        mesh = abstract_mesh(config, case.num_devices)
        assert mesh.size == case.num_devices
        check_state(config, read_shape(config)[1], mesh)
        seen.add(case.recipe)
    assert seen == {recipe.stem for recipe in path.parent.glob("*.yml")} - {"common"}


def test_a_case_of_its_own_is_described_alike_in_both_flavours():
    case = Case(("gemma3_text", 64, 32, 64, 2, 4, 2, 8), ("mesh.fsdp=2", "mesh.tensor=2", "optimizer.name=lion"))
    assert describe(case, "nnx") == describe(case, "linen")
