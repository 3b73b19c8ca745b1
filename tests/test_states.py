"""Training states of both flavours: one pure tree, the same numbers, born where the rules put them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rl.config import load_config
from rl.mesh import create_mesh, partition_spec, replicated
from rl.models.config import ModelConfig, logical_axes
from rl.models.policy import policy_from_config
from rl.models.train_state import PureState, TrainState, TrainStateNNX, pure_state
from rl.optimizer import create_training_optimizer
from rl.states import (
    InitStateFn,
    check_same_tree,
    create_sharded_state,
    get_abstract_state,
    get_first_step,
    get_logical_annotations,
    setup_decode_state,
    setup_training_state,
)

FLAVOURS = ["nnx", "linen"]
# qwen2 has biases beside matrices and norms, and an output matrix of its own when it is not tied.
SHAPE = ModelConfig.from_arch("qwen2", 24, 16, 32, 1, 4, 2, 8, tie_word_embeddings=False)
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


def setup(flavour, *overrides, shape=SHAPE, trained=True, seed=3, devices=None):
    """(config, mesh, policy, init_state_fn), all through the real constructors."""
    config = load_config(None, [f"pure_nnx={flavour == 'nnx'}".lower(), "optimizer.weight_decay=0.1", *overrides])
    policy = policy_from_config(config, shape)
    optimizer = create_training_optimizer(config, policy)[1] if trained else None
    return config, create_mesh(config.mesh, devices), policy, InitStateFn(policy, optimizer, seed)


def one_device(flavour, *overrides, **arguments):
    return setup(flavour, *overrides, devices=jax.devices()[:1], **arguments)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(left)[0], jax.tree.leaves(right), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@pytest.fixture(scope="module")
def states():
    """One fresh state per flavour, as `init_state_fn` returns it."""
    return {flavour: one_device(flavour)[3]() for flavour in FLAVOURS}


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
def test_two_calls_give_equal_and_independent_states(flavour):
    init_state_fn = one_device(flavour)[3]
    first, second = pure_state(init_state_fn()), pure_state(init_state_fn())
    assert_equal(first, second)
    for leaf in jax.tree.leaves(first):
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(second))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_another_seed_gives_other_weights_and_another_base_key(flavour):
    one, other = (pure_state(one_device(flavour, trained=False, seed=seed)[3]()) for seed in (3, 4))
    assert not np.array_equal(one.rng, other.rng)
    kernel = [state.params["layers_0"]["mlp"]["up_proj"]["kernel"] for state in (one, other)]
    assert not np.array_equal(*kernel)
    assert np.std(kernel[0]) > 0


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_init_state_fn_itself_works_under_eval_shape_and_jit(flavour):
    _, mesh, _, init_state_fn = setup(flavour, *EIGHT)
    shapes = jax.eval_shape(init_state_fn)
    built = jax.jit(init_state_fn, out_shardings=replicated(mesh))()
    assert type(built) is type(shapes)
    described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(built)] == described
    assert all(leaf.sharding == replicated(mesh) for leaf in jax.tree.leaves(built))


# Shapes, annotations, shardings


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_moments_have_the_axes_and_the_sharding_of_their_weight(flavour):
    config, mesh, policy, init_state_fn = setup(flavour, *EIGHT)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    assert abstract.annotations.params == logical_axes(policy.config)
    (adam,) = [
        part
        for part in jax.tree.leaves(abstract.annotations.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    ]
    assert adam.mu == adam.nu == abstract.annotations.params
    assert adam.count == abstract.annotations.step == ()
    adam = [
        part
        for part in jax.tree.leaves(abstract.shardings.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    ][0]
    assert adam.mu == adam.nu == abstract.shardings.params
    for scalar in (adam.count, abstract.shardings.step, abstract.shardings.rng):
        assert scalar.is_fully_replicated
    kernel = abstract.shardings.params["layers_0"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.spec == partition_spec(("embed", "heads", "head_dim"), (16, 4, 8), mesh, config.mesh.rules)
    assert kernel.spec == jax.sharding.PartitionSpec("fsdp", "tensor", None)


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
def test_a_sharded_state_has_its_shardings_and_the_numbers_of_a_single_device(flavour):
    config, mesh, _, init_state_fn = setup(flavour, *EIGHT)
    abstract = get_abstract_state(config, mesh, init_state_fn)
    sharded = create_sharded_state(init_state_fn, mesh, abstract)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == abstract.shardings
    up = sharded.params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(8, 16)}
    config, mesh, _, init_state_fn = one_device(flavour)
    single = create_sharded_state(init_state_fn, mesh, get_abstract_state(config, mesh, init_state_fn))
    assert_equal(sharded, single)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weights_and_moments_have_the_parameter_dtype(dtype):
    shape = ModelConfig.from_arch("qwen3", 24, 16, 32, 1, 4, 2, 8, param_dtype=dtype, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        for flavour in FLAVOURS:
            config, mesh, _, init_state_fn = one_device(flavour, shape=shape)
            state, _ = setup_training_state(config, mesh, init_state_fn)
            leaves = jax.tree.leaves((state.params, state.opt_state))
            assert {leaf.dtype for leaf in leaves if leaf.ndim} == {jnp.dtype(dtype)}
            assert state.step.dtype == jnp.int32


# States for training and for decoding


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_decode_state_has_no_optimizer_even_if_the_policy_is_trained(flavour):
    config, mesh, _, trained_fn = setup(flavour)
    bare_fn = InitStateFn(trained_fn.policy, None, trained_fn.seed)
    from_trained, abstract = setup_decode_state(config, mesh, trained_fn)
    from_bare, _ = setup_decode_state(config, mesh, bare_fn)
    assert from_trained.opt_state == abstract.shapes.opt_state == ()
    assert_equal(from_trained, from_bare)
    assert_equal(from_bare.params, setup_training_state(config, mesh, trained_fn)[0].params)
    assert pure_state(bare_fn()).opt_state == ()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_given_weights_stand_in_for_fresh_ones(flavour):
    config, mesh, _, init_state_fn = setup(flavour)
    fresh, abstract = setup_training_state(config, mesh, init_state_fn)
    given = jax.tree.map(lambda leaf, sharding: jax.device_put(leaf + 1, sharding), fresh.params, abstract.shardings.params)
    state, _ = setup_training_state(config, mesh, init_state_fn, given)
    assert all(a is b for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(given), strict=True))
    assert_equal(state._replace(params=fresh.params), fresh)


def test_weights_that_do_not_fit_are_named():
    config, mesh, _, init_state_fn = one_device("nnx")
    fresh, _ = setup_decode_state(config, mesh, init_state_fn)
    params = {**fresh.params, "extra": jnp.zeros(3)}
    del params["norm"]
    params["lm_head"] = {"kernel": fresh.params["lm_head"]["kernel"].T}
    params["embed_tokens"] = {"embedding": fresh.params["embed_tokens"]["embedding"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="weights do not fit the model: ") as error:
        setup_decode_state(config, mesh, init_state_fn, params)
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


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_of_both_flavours_are_the_pure_optax_updates_bit_for_bit(name):
    overrides = (f"optimizer.name={name}", "optimizer.lr=1e-2", "optimizer.warmup_updates=2", "optimizer.max_grad_norm=0.5")
    _, _, _, nnx_fn = one_device("nnx", *overrides)
    _, _, _, linen_fn = one_device("linen", *overrides)
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
def test_the_first_step_counts_whole_steps(flavour):
    _, _, policy, init_state_fn = one_device(flavour)
    state = init_state_fn()
    assert get_first_step(policy, state) == get_first_step(policy, state, 4) == 0
    pure = pure_state(state)._replace(step=jnp.int32(12))
    assert get_first_step(policy, pure) == 12
    assert get_first_step(policy, pure, updates_per_step=4) == 3
