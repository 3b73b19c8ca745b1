"""Low-rank adapters: what the two matrices compute, that nothing but them is trained, and what they take home."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rl.algorithms.from_config import loss_config
from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.models import ops
from rl.models.config import LORA_A, LORA_B, LoRAConfig, ModelConfig, flatten_specs, parameter_specs
from rl.models.flavours import LinenPolicy, NNXPolicy, policy_from_config
from rl.models.inputs import plain_inputs
from rl.models.lora import freeze, join, merge, split, unmerge
from rl.models.train_state import pure_state
from rl.state.optimizer import create_training_optimizer
from rl.state.states import InitStateFn, frozen_reference, get_abstract_state, setup_training_state
from rl.training.train_step import jit_train_step
from tests.helpers.tiny_models import FAMILIES, VOCAB, init_cache, noisy_params, tiny_config
from tests.training import test_train_step as packed

FLAVOURS = ["nnx", "linen"]
POLICIES = {"nnx": NNXPolicy, "linen": LinenPolicy}
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("*_proj",))
ONE_LAYER = {"num_layers": 1}
BASE_DTYPES = [None, "bfloat16", "int8", "int4", "float8_e4m3fn"]


def lora_config(family="llama", lora=LORA, **changes) -> ModelConfig:
    return tiny_config(family, lora=lora, **changes)


def batch_of(num_rows=2, num_tokens=6):
    tokens = jax.random.randint(jax.random.key(5), (num_rows, num_tokens), 0, VOCAB)
    return plain_inputs(tokens)


def paths_of(tree):
    return {"/".join(part.key for part in path if hasattr(part, "key")) for path, _ in jax.tree.leaves_with_path(tree)}


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0)
def outputs(policy, params):
    """What every entry point of a policy gives."""
    hidden = policy.hidden(params, batch_of())
    cached, _ = policy.extend(params, batch_of(), init_cache(policy.config, 2, 8))
    return hidden, cached, policy.unembed(params, hidden)


# The op and the tree


@pytest.mark.parametrize(("shape", "num_input_dims"), [((10, 4, 6), 1), ((4, 10, 7), 2)])
def test_dense_with_an_adapter_is_dense_with_the_sum(shape, num_input_dims):
    rng = np.random.default_rng(0)
    inputs, out = shape[:num_input_dims], shape[num_input_dims:]
    kernel, a, b = rng.normal(size=shape), rng.normal(size=(*inputs, 3)), rng.normal(size=(3, *out))
    x, bias = rng.normal(size=(2, 5, *inputs)), rng.normal(size=out)
    expected = np.tensordot(x, kernel + 0.7 * np.tensordot(a, b, 1), num_input_dims) + bias
    x, kernel, bias, a, b = (jnp.asarray(value, jnp.float32) for value in (x, kernel, bias, a, b))
    got = ops.dense(x, kernel, bias, num_input_dims, adapter=ops.Adapter(a, b, 0.7))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    low = ops.dense(x.astype(jnp.bfloat16), kernel, bias, num_input_dims, jnp.float32, ops.Adapter(a, b, 0.7))
    assert low.dtype == jnp.float32


def test_no_kernel_sized_array_is_made_of_an_adapter_nor_of_its_gradient():
    x, kernel = jnp.ones((2, 16)), jnp.ones((16, 4, 6))

    def loss(a, b):
        return jnp.sum(ops.dense(x, kernel, adapter=ops.Adapter(a, b, 0.7)) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((16, 3)), jnp.ones((3, 4, 6)))
    sizes = {equation.primitive.name: set() for equation in jaxpr.eqns}
    for equation in jaxpr.eqns:
        sizes[equation.primitive.name] |= {out.aval.size for out in equation.outvars}
    # The one array of that size is the kernel itself as a matrix.
    assert {name for name, found in sizes.items() if kernel.size in found} == {"reshape"}
    assert {16 * 3, 3 * 24} <= sizes["dot_general"]


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert LoRAConfig(16, 32.0, ("*",)).scale == 2.0
    assert LoRAConfig(16, 32.0, ("*",), rank_stabilized=True).scale == 8.0


def test_adapters_lie_beside_their_kernels_with_the_axes_of_both():
    specs = dict(flatten_specs(parameter_specs(lora_config("qwen2", tie_word_embeddings=False))))
    attention = ("layers_1", "self_attn")
    assert specs[(*attention, "q_proj", LORA_A)][:2] == ((16, 3), ("embed", "lora"))
    assert specs[(*attention, "q_proj", LORA_B)][:2] == ((3, 4, 8), ("lora", "heads", "head_dim"))
    assert specs[(*attention, "o_proj", LORA_A)][:2] == ((4, 8, 3), ("heads", "head_dim", "lora"))
    assert specs[(*attention, "o_proj", LORA_B)][:2] == ((3, 16), ("lora", "embed"))
    assert sum(path[-1] == LORA_A for path in specs) == 2 * 7


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_targets_choose_modules_and_the_twins_declare_what_the_specs_say(flavour):
    lora = LoRAConfig(2, 2.0, ("layers_1/self_attn/[qv]_proj", "lm_head"))
    config = lora_config("qwen2", lora, tie_word_embeddings=False)
    params = POLICIES[flavour](config).init(jax.random.key(0))
    assert paths_of(params) == {"/".join(path) for path, _ in flatten_specs(parameter_specs(config))}
    adapted = {path.removesuffix("/" + LORA_A) for path in paths_of(params) if path.endswith(LORA_A)}
    assert adapted == {"layers_1/self_attn/q_proj", "layers_1/self_attn/v_proj", "lm_head"}


@pytest.mark.parametrize("pattern", ["query", "layers_7/*", "embed_tokens", "*/kernel", "lm_head"])
def test_a_target_that_matches_nothing_is_refused_with_the_names(pattern):
    with pytest.raises(ValueError, match="each match a matrix") as error:
        lora_config(lora=LoRAConfig(2, 2.0, ("*_proj", pattern)))
    assert f"got {pattern!r}" in str(error.value)
    assert "layers_*/self_attn/q_proj" in str(error.value)
    assert "embed_tokens" not in str(error.value).partition("the names are")[2]


def test_fresh_adapters_are_uniform_times_zero_and_equal_in_both_flavours():
    config = lora_config(hidden_size=64, intermediate_size=400)
    trees = [POLICIES[flavour](config).init(jax.random.key(1)) for flavour in FLAVOURS]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    for path, leaf in flatten_leaves(split(config, trees[0])[0]):
        if path[-1] == LORA_B:
            assert not np.any(leaf)
            continue
        bound = np.prod(leaf.shape[:-1]) ** -0.5
        assert 0.9 * bound < np.abs(leaf).max() <= bound
        assert abs(np.std(leaf) - bound / 3**0.5) < 0.1 * bound
    layers = trees[0]["layers_0"]["mlp"], trees[0]["layers_1"]["mlp"]
    assert np.any(layers[0]["up_proj"][LORA_A] != layers[1]["up_proj"][LORA_A])
    # The base is the one of a model without adapters.
    base = NNXPolicy(dataclasses.replace(config, lora=None)).init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, split(config, trees[0])[1], base)


def flatten_leaves(tree):
    return [(tuple(part.key for part in path), np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)]


def test_halves_of_a_tree_join_to_the_tree():
    config = lora_config("gemma3_text")
    params = noisy_params(config)
    trained, frozen = split(config, params)
    assert all(path.endswith((LORA_A, LORA_B)) for path in paths_of(trained))
    assert paths_of(frozen) == paths_of(noisy_params(dataclasses.replace(config, lora=None)))
    both = join(trained, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(params), strict=True))


# Whole models


@pytest.mark.parametrize(
    ("family", "base_dtype"), [*zip(FAMILIES, [None, "int8", "int4", "float8_e4m3fn"], strict=True)]
)
def test_twins_are_the_same_program_with_adapters(family, base_dtype):
    """Equal before compilation, so equal bit for bit after it, on any machine."""
    lora = LoRAConfig(3, 6.0, ("*_proj",), base_dtype=base_dtype, base_group_size=4 if base_dtype == "int4" else None)
    config = lora_config(family, lora, tie_word_embeddings=family in ("llama", "gemma3_text"), remat="block")
    shapes = jax.eval_shape(lambda key: freeze(config, ops.init_params(config, key)), jax.random.key(0))
    for method, arguments in (
        ("hidden", (batch_of(),)),
        ("extend", (batch_of(), init_cache(config, 2, 8))),
        ("unembed", (jnp.ones((2, 16)),)),
    ):
        linen, nnx_program = (
            jax.jit(getattr(policy(config), method)).lower(shapes, *arguments).as_text() for policy in POLICIES.values()
        )
        assert linen == nnx_program
        assert method == "unembed" or "x3xf32>" in linen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_with_adapters_computes_as_one_with_merged_weights(family):
    lora, layers = LoRAConfig(3, 6.0, ("*_proj", "lm_head")), {} if family == "gemma3_text" else ONE_LAYER
    config = lora_config(family, lora, tie_word_embeddings=False, **layers)
    policy, params = NNXPolicy(config), noisy_params(config)
    plain, merged = policy.without_adapters(), merge(config, params)
    got, want = outputs(policy, params), outputs(plain, merged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    base = outputs(plain, split(config, params)[1])
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(got, base, strict=True))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fresh_adapters_change_nothing(flavour):
    config = lora_config("qwen3", **ONE_LAYER)
    policy = POLICIES[flavour](config)
    params = policy.init(jax.random.key(2))
    base = split(config, params)[1]
    got, want = outputs(policy, params), outputs(policy.without_adapters(), base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_tree_without_its_adapters_is_refused(flavour):
    config = lora_config()
    policy, params = POLICIES[flavour](config), noisy_params(config)
    with pytest.raises(ValueError, match="layers_0/self_attn/q_proj/lora_a is missing"):
        policy.hidden(split(config, params)[1], batch_of())
    with pytest.raises(ValueError, match="lora_a has no place"):
        policy.without_adapters().hidden(params, batch_of())


# Merging


def test_merged_weights_are_the_float64_sum_rounded_once():
    config = lora_config("qwen2")
    params = noisy_params(config)
    module, merged = params["layers_0"]["self_attn"]["q_proj"], merge(config, params)
    a, b, kernel = (np.asarray(module[name], np.float64) for name in (LORA_A, LORA_B, "kernel"))
    got = merged["layers_0"]["self_attn"]["q_proj"]
    np.testing.assert_array_equal(got["kernel"], (kernel + 2.0 * np.tensordot(a, b, 1)).astype(np.float32))
    np.testing.assert_array_equal(got["bias"], module["bias"])
    assert paths_of(merged) == paths_of(noisy_params(dataclasses.replace(config, lora=None)))


def test_unmerged_weights_are_the_base_to_a_unit_in_the_last_place():
    config = lora_config("gemma3_text")
    params = noisy_params(config)
    trained, base = split(config, params)
    merged = merge(config, params)
    back = unmerge(config, merged, trained)
    for (path, got), (_, want), (_, between) in zip(*map(flatten_leaves, (back, base, merged)), strict=True):
        unit = np.spacing(np.maximum(np.abs(want), np.abs(between)))
        assert (np.abs(got.astype(np.float64) - want) <= unit).all(), path


# States and the train step


def setup(flavour, *overrides, config=None, devices=1):
    run = load_config(None, [f"pure_nnx={flavour == 'nnx'}".lower(), *overrides])
    policy = policy_from_config(run, lora_config("qwen2") if config is None else config)
    optimizer = create_training_optimizer(run, policy)[1]
    return run, create_mesh(run.mesh, jax.devices()[:devices]), policy, InitStateFn(policy, optimizer, 3)


@pytest.mark.parametrize(
    ("optimizer", "base_dtype"),
    [("adamw", None), ("muon", "int8"), ("adafactor", "bfloat16"), ("lion", "int4")],
)
def test_states_of_both_flavours_are_equal_and_have_moments_of_adapters_only(optimizer, base_dtype):
    config = lora_config("qwen2", dataclasses.replace(LORA, base_dtype=base_dtype), **ONE_LAYER)
    states = []
    for flavour in FLAVOURS:
        parts = setup(flavour, f"optimizer.name={optimizer}", "optimizer.weight_decay=0.1", config=config)
        state, abstract = setup_training_state(parts[0], parts[1], parts[3])
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == abstract.shardings
        states.append(state)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(np.testing.assert_array_equal, *states)
    adapters = num_bytes(split(config, states[0].params)[0])
    moments = [leaf for leaf in jax.tree.leaves(states[0].opt_state) if leaf.ndim]
    if optimizer == "adamw":
        assert num_bytes(moments) == 2 * adapters
    assert 0 < num_bytes(moments) <= 2 * adapters + 8 * len(moments)


def test_a_quantised_base_takes_a_quarter_of_its_matrices():
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 512, "num_heads": 8, "head_dim": 16}
    bytes_of = {}
    for base_dtype in BASE_DTYPES:
        config = lora_config(lora=dataclasses.replace(LORA, base_dtype=base_dtype), **sizes)
        shapes = get_abstract_state(*setup("nnx", config=config)[:2], setup("nnx", config=config)[3]).shapes
        trained, frozen = split(config, shapes.params)
        bytes_of[base_dtype] = num_bytes(frozen)
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert bytes_of["bfloat16"] * 2 == bytes_of[None]
    assert bytes_of["int8"] == bytes_of["float8_e4m3fn"] < 0.32 * bytes_of[None]
    # `num_bytes` counts a byte for each int4, of which devices that can pack them hold two.
    assert bytes_of["int4"] == bytes_of["int8"]


@pytest.mark.parametrize(("base_dtype", "group_size"), [(None, None), ("int8", None), ("int4", 4)])
def test_states_lie_on_a_mesh_as_the_rules_say(base_dtype, group_size):
    lora = dataclasses.replace(LORA, base_dtype=base_dtype, base_group_size=group_size)
    config = lora_config("qwen2", lora)
    run, mesh, _, init_state_fn = setup("nnx", "mesh.fsdp=4", "mesh.tensor=2", config=config, devices=8)
    state, abstract = setup_training_state(run, mesh, init_state_fn)
    attention = state.params["layers_0"]["self_attn"]
    assert attention["q_proj"][LORA_A].sharding.spec == PartitionSpec("fsdp", None)
    assert attention["q_proj"][LORA_B].sharding.spec == PartitionSpec(None, "tensor", None)
    if base_dtype is not None:
        kernel, names = attention["o_proj"]["kernel"], abstract.annotations.params["layers_0"]["self_attn"]["o_proj"]
        assert kernel.values.sharding.spec == PartitionSpec("tensor", None, "fsdp")
        grouped = group_size is not None
        assert kernel.scale.shape == ((4, 2, 16) if grouped else (1, 1, 16))
        assert kernel.scale.sharding.spec == PartitionSpec("tensor" if grouped else None, None, "fsdp")
        assert names["kernel"].scale == (("heads", "head_dim", "embed") if grouped else (None, None, "embed"))
        kernel = attention["q_proj"]["kernel"]
        assert kernel.scale.sharding.spec == PartitionSpec("fsdp" if grouped else None, "tensor", None)
    alone = setup_training_state(*[setup("nnx", config=config)[i] for i in (0, 1, 3)])[0]
    jax.tree.map(np.testing.assert_array_equal, state, alone)


def trainer_of(flavour, lora, optimizer=packed.KEEP_GRADIENT, remat="none"):
    """`packed.Trainer` of the tiny model with adapters."""
    run = load_config(None, list(packed.COMPOSITE))
    mesh = create_mesh(run.mesh, jax.devices()[:1])
    policy = POLICIES[flavour](packed.tiny_config(lora=lora, remat=remat))
    abstract = get_abstract_state(run, mesh, InitStateFn(policy, optimizer, 0))
    step = jit_train_step(
        policy,
        optimizer,
        loss_config(run),
        abstract.shardings,
        mesh=mesh,
        rules=run.mesh.rules,
        temperature=packed.TEMPERATURE,
        chunk_size=packed.CHUNK_SIZE,
        minibatches_per_rollout=1,
    )
    return packed.Trainer(policy, packed.PLAN, mesh, run.mesh.rules, abstract, optimizer, step)


def fresh_state(trainer):
    """The trainer's state around noisy weights."""
    config = trainer.policy.config
    params = jax.jit(functools.partial(freeze, config))(packed.noisy_params(config))
    trained = split(config, params)[0]
    return pure_state(
        trainer.policy.state_class.build(trainer.policy, params, trainer.optimizer, jnp.zeros(2, "uint32"))
    )._replace(opt_state=trainer.optimizer.init(trained))


@pytest.fixture(scope="module")
def problem():
    return packed.random_problem()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_gradient_of_adapters_is_that_of_the_merged_weights_by_the_chain_rule(flavour, problem):
    """W' = W + s A B: dA = s dW' B^T and dB = s A^T dW', with dW' from the train step of a model without adapters."""
    trainer, plain = trainer_of(flavour, LORA), trainer_of(flavour, None)
    config, state = trainer.policy.config, fresh_state(trainer)
    modules = [
        (f"{block}", name) for block, names in state.params["layers_0"].items() for name in names if "_proj" in name
    ]
    before = jax.tree.map(np.array, state.params)
    state, update = trainer.train_step(state, trainer.minibatch(problem))
    merged = jax.tree.map(jnp.asarray, merge(config, before))
    whole = fresh_state(plain)._replace(params=merged)
    whole, want = plain.train_step(whole, plain.minibatch(problem))
    np.testing.assert_allclose(update.loss, want.loss, rtol=1e-5)
    assert len(modules) == 7
    for block, name in modules:
        got, adapter = state.opt_state["layers_0"][block][name], before["layers_0"][block][name]
        gradient = np.asarray(whole.opt_state["layers_0"][block][name]["kernel"], np.float64)
        num_inputs = adapter[LORA_A].ndim - 1
        outputs_of, inputs_of = tuple(range(num_inputs, gradient.ndim)), tuple(range(num_inputs))
        want_a = LORA.scale * np.tensordot(
            gradient, adapter[LORA_B], (outputs_of, tuple(range(1, adapter[LORA_B].ndim)))
        )
        want_b = LORA.scale * np.tensordot(adapter[LORA_A], gradient, (inputs_of, inputs_of))
        packed.assert_close_leaf_by_leaf(
            jax.device_get(got), {LORA_A: want_a.astype("f4"), LORA_B: want_b.astype("f4")}, 2e-5
        )


@pytest.mark.parametrize(("flavour", "base_dtype"), [("nnx", None), ("linen", "int8")])
def test_an_update_moves_the_adapters_and_leaves_the_very_arrays_of_the_base(flavour, base_dtype, problem):
    trainer = trainer_of(flavour, dataclasses.replace(LORA, base_dtype=base_dtype), packed.ADAM)
    state = fresh_state(trainer)
    trained, frozen = split(trainer.policy.config, state.params)
    before = jax.tree.map(np.array, trained)
    reference = frozen_reference(trainer.policy, state)
    for _ in range(2):
        old = state
        state, _ = trainer.train_step(state, trainer.minibatch(problem))
        assert old.step.is_deleted()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(split(trainer.policy.config, old.params)[0]))
    moved, kept = split(trainer.policy.config, state.params)
    assert all(a is b for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(frozen), strict=True))
    assert all(a is b for a, b in zip(jax.tree.leaves(reference.params), jax.tree.leaves(frozen), strict=True))
    assert int(reference.step) == 0
    for (path, a), (_, b) in zip(flatten_leaves(moved), flatten_leaves(before), strict=True):
        assert np.abs(a - b).max() > 1e-4, path


def test_both_flavours_make_the_same_update_with_a_quantised_base(problem):
    lora = dataclasses.replace(LORA, base_dtype="int4", base_group_size=4)
    trainers = [trainer_of(flavour, lora, packed.ADAM, remat="block") for flavour in FLAVOURS]
    results = [t.train_step(fresh_state(t), t.minibatch(problem)) for t in trainers]
    jax.tree.map(np.testing.assert_array_equal, *results)
    host = [
        packed.host_calls(t.train_step, state, jax.device_put(t.minibatch(problem)))
        for t, (state, _) in zip(trainers, results, strict=True)
    ]
    assert host[0] == host[1] > 0
