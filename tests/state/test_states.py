"""Training states of both flavours: one pure tree, the same numbers, born where the rules put them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, partition_spec, replicated
from rl.models.config import ModelConfig, logical_axes
from rl.models.flavours import policy_from_config
from rl.models.train_state import PureState, TrainState, TrainStateNNX, pure_state
from rl.state.optimizer import create_training_optimizer
from rl.state.states import (
    InitStateFn,
    check_same_tree,
    get_abstract_state,
    get_first_step,
    get_logical_annotations,
    setup_decode_state,
    setup_training_state,
)

FLAVOURS = ["nnx", "linen"]
# qwen2 has biases beside matrices and norms, and an output matrix of its own when it is not tied.
SHAPE = ModelConfig.from_arch("qwen2", 24, 16, 32, 1, 4, 2, 8, tie_word_embeddings=False)
FUSED = 3e-7  # compiled as a whole, random numbers are scaled in another order than operation by operation
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


def setup(flavour, *overrides, shape=SHAPE, trained=True, seed=3, devices=None):
    """(config, mesh, policy, init_state_fn), all through the real constructors."""
    config = load_config(None, [f"pure_nnx={flavour == 'nnx'}".lower(), "optimizer.weight_decay=0.1", *overrides])
    policy = policy_from_config(config, shape)
    optimizer = create_training_optimizer(config, policy)[1] if trained else None
    return config, create_mesh(config.mesh, devices), policy, InitStateFn(policy, optimizer, seed)


def one_device(flavour, *overrides, **arguments):
    return setup(flavour, *overrides, devices=jax.devices()[:1], **arguments)


def assert_equal(left, right, rtol=0.0):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(left)[0], jax.tree.leaves(right), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=0, err_msg=name)


@pytest.fixture(scope="module")
def states():
    """One fresh state per flavour, as `init_state_fn` returns it."""
    return {flavour: one_device(flavour)[3]() for flavour in FLAVOURS}


@pytest.fixture(scope="module")
def sharded():
    """One fresh state per flavour on eight devices, with its abstract state."""
    return {flavour: setup_training_state(*without_policy(setup(flavour, *EIGHT))) for flavour in FLAVOURS}


def without_policy(parts):
    config, mesh, _, init_state_fn = parts
    return config, mesh, init_state_fn


# Flavours


def test_each_flavour_builds_its_own_state(states):
    assert isinstance(states["linen"], TrainState)
    assert isinstance(states["nnx"], TrainStateNNX)
    assert isinstance(states["nnx"].optimizer, nnx.Optimizer)


def test_both_flavours_become_the_same_pure_tree(states):
    assert_equal(pure_state(states["nnx"]), pure_state(states["linen"]))


def test_the_pure_tree_holds_plain_arrays_at_step_zero(states):
    for state in states.values():
        pure = pure_state(state)
        assert isinstance(pure, PureState)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pure))
        assert (pure.step.dtype, int(pure.step)) == (jnp.int32, 0)
        assert pure.rng.dtype == jnp.uint32
        assert pure_state(pure) is pure
        moments = [leaf for leaf in jax.tree.leaves(pure.opt_state) if leaf.ndim]
        assert len(moments) == 2 * len(jax.tree.leaves(pure.params))
        assert not any(np.any(moment) for moment in moments)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_calls_give_equal_and_independent_states(flavour, states):
    first = pure_state(one_device(flavour)[3]())
    assert_equal(first, pure_state(states[flavour]))
    for leaf in jax.tree.leaves(first):
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(pure_state(states[flavour])))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_another_seed_gives_other_weights_and_another_base_key(flavour):
    one, other = (pure_state(one_device(flavour, trained=False, seed=seed)[3]()) for seed in (3, 4))
    assert not np.array_equal(one.rng, other.rng)
    kernel = [state.params["layers_0"]["mlp"]["up_proj"]["kernel"] for state in (one, other)]
    assert not np.array_equal(*kernel)
    assert np.std(kernel[0]) > 0


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_init_state_fn_itself_works_under_eval_shape(flavour, states):
    shapes = jax.eval_shape(one_device(flavour)[3])
    assert type(shapes) is type(states[flavour])
    described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(states[flavour])]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)] == described


def test_an_nnx_state_itself_is_born_sharded_under_jit(states):
    _, mesh, _, init_state_fn = setup("nnx", *EIGHT)
    state = jax.jit(init_state_fn, out_shardings=replicated(mesh))()
    assert isinstance(state, TrainStateNNX)
    assert all(leaf.sharding == replicated(mesh) for leaf in jax.tree.leaves(state))
    assert_equal(pure_state(state), pure_state(states["nnx"]), rtol=FUSED)


# Shapes, annotations, shardings


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_moments_have_the_axes_and_the_sharding_of_their_weight(flavour):
    config, mesh, policy, init_state_fn = setup(flavour, *EIGHT)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    axes, shardings = adam_of(abstract.annotations), adam_of(abstract.shardings)
    assert axes.mu == axes.nu == abstract.annotations.params == logical_axes(policy.config)
    assert axes.count == abstract.annotations.step == ()
    assert shardings.mu == shardings.nu == abstract.shardings.params
    for scalar in (shardings.count, abstract.shardings.step, abstract.shardings.rng):
        assert scalar.is_fully_replicated
    kernel = abstract.shardings.params["layers_0"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.spec == partition_spec(("embed", "heads", "head_dim"), (16, 4, 8), mesh, config.mesh.rules)
    assert kernel.spec == PartitionSpec("fsdp", "tensor", None)


def test_factors_of_a_second_moment_have_the_axes_that_were_not_summed_over():
    """Adafactor sums `v_row` over the largest dim and `v_col` over the second largest; of equal dims the last counts as
    the largest.
    """
    shape = ModelConfig.from_arch("qwen2", 24, 16, 16, 1, 4, 2, 8)
    settings = ("optimizer.name=adafactor", "optimizer.adafactor_min_dim=8", *EIGHT)
    config, mesh, _, init_state_fn = setup("nnx", *settings, shape=shape)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    is_factored = lambda part: isinstance(part, optax.FactoredState)  # noqa: E731
    shapes, annotations, shardings = (
        next(filter(is_factored, jax.tree.leaves(state.opt_state, is_leaf=is_factored))) for state in abstract
    )
    none = (None,)
    expected = {  # weight: the axes of v_row, v_col and v
        ("embed_tokens", "embedding"): (("embed",), ("vocab",), none),  # [24, 16]
        ("layers_0", "mlp", "up_proj", "kernel"): (("embed",), ("mlp",), none),  # [16, 16]
        ("layers_0", "mlp", "down_proj", "kernel"): (("mlp",), ("embed",), none),  # [16, 16]
        ("layers_0", "self_attn", "q_proj", "kernel"): (("heads", "head_dim"), ("embed", "heads"), none),  # [16, 4, 8]
        ("layers_0", "self_attn", "o_proj", "kernel"): (("heads", "head_dim"), ("heads", "embed"), none),  # [4, 8, 16]
        ("layers_0", "self_attn", "q_proj", "bias"): (none, none, ("heads", "head_dim")),  # [4, 8]
        ("norm", "scale"): (none, none, ("norm",)),  # [16]
    }
    for path, want in expected.items():
        leaf = lambda tree, path=path: functools.reduce(lambda part, key: part[key], path, tree)  # noqa: E731
        for field, axes in zip(("v_row", "v_col", "v"), want, strict=True):
            moment, got = leaf(getattr(shapes, field)), leaf(getattr(annotations, field))
            assert got == axes, (path, field)
            spec = partition_spec(axes, moment.shape, mesh, config.mesh.rules)
            assert leaf(getattr(shardings, field)).spec == spec, (path, field)
    assert leaf_spec(shardings.v_col, "q_proj") == PartitionSpec("fsdp", "tensor")
    assert annotations.count == ()


def leaf_spec(tree, projection):
    return tree["layers_0"]["self_attn"][projection]["kernel"].spec


@pytest.mark.parametrize("name", ["lion", "muon", "sgd"])
def test_first_moments_of_every_optimizer_have_the_sharding_of_their_weight(name):
    config, mesh, _, init_state_fn = setup("nnx", f"optimizer.name={name}", "optimizer.sgd_momentum=0.9", *EIGHT)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    weights = {jax.tree_util.keystr(path): where for path, where in leaves_of(abstract.shardings.params)}
    found = set()
    for path, where in leaves_of(abstract.shardings.opt_state):
        _, dot, weight = jax.tree_util.keystr(path).replace(".trace[", ".mu[").partition(".mu")
        if dot:
            assert where == weights[weight], weight
            found.add(weight)
    assert found == set(weights)


def leaves_of(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def adam_of(state):
    """Adam's part of an optimizer state."""
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    (adam,) = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
    return adam


def test_annotations_are_the_same_in_both_flavours():
    annotations = []
    for flavour in FLAVOURS:
        config, mesh, _, init_state_fn = setup(flavour)
        annotations.append(get_logical_annotations(config, mesh, init_state_fn))
    assert annotations[0] == annotations[1]


def test_shapes_are_known_without_computing_anything():
    huge = ModelConfig.from_arch("llama", 128_256, 16_384, 53_248, 2, 128, 8, 128)
    config, mesh, _, init_state_fn = setup("nnx", shape=huge)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    assert abstract.shapes.params["layers_1"]["mlp"]["up_proj"]["kernel"].shape == (16_384, 53_248)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_sharded_state_has_its_shardings_and_the_numbers_of_a_single_device(flavour, sharded, states):
    state, abstract = sharded[flavour]
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == abstract.shardings
    up = state.params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(8, 16)}
    assert_equal(state, pure_state(states[flavour]), rtol=FUSED)


def test_sharded_states_of_both_flavours_are_equal_bit_for_bit(sharded):
    assert_equal(sharded["nnx"][0], sharded["linen"][0])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("dtype", "moments"), [("bfloat16", "float32"), ("float64", "float64")])
def test_weights_have_the_parameter_dtype_and_moments_float32_at_least(dtype, moments, flavour):
    shape = ModelConfig.from_arch("qwen3", 24, 16, 32, 1, 4, 2, 8, param_dtype=dtype, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        config, mesh, _, init_state_fn = one_device(flavour, shape=shape)
        state = get_abstract_state(config, mesh, init_state_fn).shapes
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype(moments)}
        assert state.step.dtype == jnp.int32


# States for training and for decoding


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_abstract_decode_state_is_that_of_a_policy_without_optimizer(flavour):
    config, mesh, _, trained_fn = setup(flavour)
    bare_fn = InitStateFn(trained_fn.policy, None, trained_fn.seed)
    abstract = get_abstract_state(config, mesh, trained_fn, is_training=False)
    assert abstract.shapes.opt_state == abstract.annotations.opt_state == abstract.shardings.opt_state == ()
    assert abstract == get_abstract_state(config, mesh, bare_fn, is_training=False)
    assert abstract == get_abstract_state(config, mesh, bare_fn, is_training=True)


def test_a_decode_state_has_the_weights_of_the_training_state_and_no_optimizer(sharded):
    state, abstract = setup_decode_state(*without_policy(setup("linen", *EIGHT)))
    assert state.opt_state == ()
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == abstract.shardings
    assert_equal(state, sharded["linen"][0]._replace(opt_state=()))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_given_weights_stand_in_for_fresh_ones(flavour, sharded):
    fresh, abstract = sharded[flavour]
    given = jax.tree.map(
        lambda leaf, where: jax.device_put(np.asarray(leaf) + 1, where), fresh.params, abstract.shardings.params
    )
    state, _ = setup_training_state(*without_policy(setup(flavour, *EIGHT)), given)
    assert all(a is b for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(given), strict=True))
    assert_equal(state._replace(params=fresh.params), fresh)


def test_weights_that_do_not_fit_are_named(sharded):
    fresh = sharded["nnx"][0]
    params = {**fresh.params, "extra": jnp.zeros(3)}
    del params["norm"]
    params["lm_head"] = {"kernel": fresh.params["lm_head"]["kernel"].T}
    params["embed_tokens"] = {"embedding": fresh.params["embed_tokens"]["embedding"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="weights do not fit the model: ") as error:
        setup_decode_state(*without_policy(setup("nnx", *EIGHT)), params)
    for problem in (
        "missing ['norm']['scale']",
        "unexpected ['extra']",
        "['lm_head']['kernel'] must be float32[16, 24], got float32[24, 16]",
        "['embed_tokens']['embedding'] must be float32[24, 16], got bfloat16[24, 16]",
    ):
        assert problem in str(error.value)


def test_a_long_list_of_problems_is_cut_and_counted():
    want = {f"layer_{i:02}": jnp.zeros(1) for i in range(20)}
    with pytest.raises(ValueError, match=r"missing \['layer_07'\] and 12 more$"):
        check_same_tree({}, want, "weights")
    check_same_tree(want, want, "weights")


# A real update


def with_jitted_update(init_state_fn):
    """With an optimizer that computes its updates as one program, as a run does, and not operation by operation."""
    optimizer = init_state_fn.optimizer
    jitted = optax.GradientTransformationExtraArgs(optimizer.init, jax.jit(optimizer.update))
    return dataclasses.replace(init_state_fn, optimizer=jitted)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_updates_of_both_flavours_are_the_pure_optax_updates_bit_for_bit(name):
    overrides = (
        f"optimizer.name={name}",
        "optimizer.adafactor_min_dim=4",
        "optimizer.sgd_momentum=0.9",
        "optimizer.lr_groups=[{pattern: '*/bias', lr_scale: 2}]",
        "optimizer.lr=1e-2",
        "optimizer.warmup_updates=2",
        "optimizer.max_grad_norm=0.5",
    )
    nnx_fn, linen_fn = (with_jitted_update(one_device(flavour, *overrides)[3]) for flavour in FLAVOURS)
    module, linen = nnx_fn(), linen_fn()
    start = pure_state(linen)
    params, opt_state = start.params, linen_fn.optimizer.init(start.params)
    for update in range(3):
        grads = jax.tree.map(lambda leaf, u=update: jnp.sin(leaf * 50 + u), params)
        steps, opt_state = linen_fn.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, steps)
        state = nnx.state(module.model, nnx.Param)
        nnx.replace_by_pure_dict(state, grads)
        module.optimizer.update(module.model, state)
        linen = linen.apply_gradients(grads=grads)
        want = PureState(jnp.int32(update + 1), params, opt_state, start.rng)
        assert_equal(pure_state(module), want)
        assert_equal(pure_state(linen), want)
        assert get_first_step(nnx_fn.policy, module) == get_first_step(linen_fn.policy, linen) == update + 1
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), start.params, params)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_first_step_counts_whole_steps(flavour, states):
    policy, state = one_device(flavour)[2], states[flavour]
    assert get_first_step(policy, state) == get_first_step(policy, state, 4) == 0
    pure = pure_state(state)._replace(step=jnp.int32(12))
    assert get_first_step(policy, pure) == 12
    assert get_first_step(policy, pure, updates_per_step=4) == 3
