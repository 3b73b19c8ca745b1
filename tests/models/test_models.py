"""The twins: the same tree, the same numbers bit for bit, one attention rule, with a cache and without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rl.models import cache as kv
from rl.models import linen_model, nnx_model, ops, scanned
from rl.models.config import LoRAConfig, RopeScaling, flatten_specs, logical_axes, parameter_specs
from rl.models.flavours import LinenPolicy, NNXPolicy, create_policy
from rl.models.inputs import Inputs, plain_inputs
from rl.models.lora import freeze, join, split
from tests.helpers.tiny_models import FAMILIES, VOCAB, init_cache, noisy_params, tiny_config


def run_hidden(policy, params, batch):
    return jax.jit(policy.hidden)(params, batch)


def plain_batch(num_rows=3, num_tokens=7, seed=5):
    tokens = jax.random.randint(jax.random.key(seed), (num_rows, num_tokens), 0, VOCAB)
    return plain_inputs(tokens)


def both(config):
    return LinenPolicy(config), NNXPolicy(config)


def assert_trees_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# The parameter tree


def own_initialisations(config):
    """What each twin's modules make of a key."""
    inputs = plain_inputs(jnp.zeros((1, 1), jnp.int32))
    linen = linen_model.CausalLM(config)
    return (
        lambda key: linen.init({"params": key}, inputs)["params"],
        lambda key: nnx.to_pure_dict(nnx.state(nnx_model.CausalLM(config, nnx.Rngs(params=key)))),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_both_twins_declare_the_specified_tree(family, tied):
    config = tiny_config(family, tie_word_embeddings=tied)
    shapes = {path: spec.shape for path, spec in flatten_specs(parameter_specs(config))}
    for init in own_initialisations(config):
        leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0)))
        assert {tuple(k.key for k in path): leaf.shape for path, leaf in leaves} == shapes
        assert all(leaf.dtype == jnp.float32 for _, leaf in leaves)
        assert config.num_parameters == sum(leaf.size for _, leaf in leaves)


@pytest.mark.parametrize("lora", [None, LoRAConfig(2, 2.0, ("*_proj", "lm_head"))])
def test_both_twins_draw_the_same_numbers(lora):
    config = tiny_config("gemma3_text", tie_word_embeddings=False, attention_bias=True, lora=lora)
    key = jax.random.key(11)
    linen, nnx_params = (init(key) for init in own_initialisations(config))
    assert_trees_identical(linen, nnx_params)
    for policy in both(config):
        assert_trees_identical(linen, policy.init(key))


def test_biases_exist_where_the_family_has_them():
    llama = parameter_specs(tiny_config("llama", attention_bias=True, mlp_bias=True))["layers_0"]
    assert {"kernel", "bias"} == set(llama["self_attn"]["o_proj"]) == set(llama["mlp"]["down_proj"])
    qwen2 = parameter_specs(tiny_config("qwen2"))["layers_1"]["self_attn"]
    assert [qwen2[name]["bias"].shape for name in ("q_proj", "v_proj")] == [(4, 8), (2, 8)]
    assert set(qwen2["o_proj"]) == {"kernel"}


def test_logical_axes_name_every_dim():
    for family in FAMILIES:
        config = tiny_config(family, tie_word_embeddings=False)
        axes = logical_axes(config)
        assert axes["layers_0"]["self_attn"]["q_proj"]["kernel"] == ("embed", "heads", "head_dim")
        assert axes["layers_0"]["self_attn"]["o_proj"]["kernel"] == ("heads", "head_dim", "embed")
        assert axes["lm_head"]["kernel"] == ("embed", "vocab")
        params = jax.eval_shape(lambda key, config=config: ops.init_params(config, key), jax.random.key(0))
        ranks = jax.tree.map(lambda names, leaf: len(names) == leaf.ndim, axes, params, is_leaf=_is_names)
        assert all(jax.tree.leaves(ranks))


def _is_names(node):
    return isinstance(node, tuple)


def test_initial_values_have_the_deviation_asked_for_and_differ_between_layers():
    config, key = tiny_config(initializer_range=0.5), jax.random.key(0)
    first, other_layer, other_name = (
        ops.initial_value(config, key, path, (64, 24))
        for path in (("layers_0", "gate_proj", "kernel"), ("layers_1", "gate_proj", "kernel"), ("layers_0", "kernel"))
    )
    assert abs(float(first.std()) - 0.5) < 0.03
    assert not np.array_equal(first, other_layer)
    assert not np.array_equal(first, other_name)


# Linen == NNX


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_twins_agree_bit_for_bit_in_values_and_gradients(family):
    config = tiny_config(family, tie_word_embeddings=family != "qwen2")
    params, batch = noisy_params(config), plain_batch()

    def loss_of(policy):
        def loss(params):
            hidden = policy.hidden(params, batch)
            return jnp.sum(jnp.sin(policy.unembed(params, hidden))), hidden

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (linen, nnx_result) = (loss_of(policy)(params) for policy in both(config))
    assert_trees_identical(linen, nnx_result)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(linen[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_are_the_same_program(family):
    """Equal before compilation, so equal bit for bit after it, on any machine."""
    config = tiny_config(family)
    params, batch = noisy_params(config), plain_batch()
    cache = init_cache(config, num_rows=3, length=9)
    for method, arguments in (("hidden", (batch,)), ("extend", (batch, cache)), ("unembed", (jnp.ones((2, 16)),))):
        programs = [jax.jit(getattr(policy, method)).lower(params, *arguments).as_text() for policy in both(config)]
        assert programs[0] == programs[1]


@pytest.mark.parametrize("family", ["qwen3"])
def test_twins_agree_bit_for_bit_through_the_cache(family):
    config = tiny_config(family)
    params, batch = noisy_params(config), plain_batch()
    results = [
        jax.jit(policy.extend)(params, batch, init_cache(config, num_rows=3, length=9)) for policy in both(config)
    ]
    assert_trees_identical(*results)


def compile_all(functions, *arguments, **options):
    """The functions, compiled, see `compile_traced`."""
    return compile_traced([jax.jit(function, **options).trace(*arguments) for function in functions])


def compile_traced(traced):
    """The functions, compiled; those that are one program before compilation are one after it, and compiled once."""
    lowered = [function.lower() for function in traced]
    programs = {program.as_text(): program for program in lowered}
    compiled = {text: program.compile() for text, program in programs.items()}
    return [compiled[program.as_text()] for program in lowered]


@functools.cache
def unrolled(num_layers):
    """A model with parameters, a batch, and their gradients by the plain backward pass."""
    config = tiny_config("gemma3_text", layer_types=None, num_layers=num_layers)
    params, batch = noisy_params(config), plain_batch()
    return config, params, batch, jax.jit(jax.grad(_hidden_loss(NNXPolicy(config), batch)))(params)


# Five layers, so that "full" has segments of two and a shorter last one.
@pytest.mark.parametrize(("remat", "num_layers"), [("dots", 2), ("outputs", 2), ("block", 2), ("full", 5)])
def test_rematerialisation_changes_gradients_in_no_twin_and_is_really_on(remat, num_layers):
    config, params, batch, plain = unrolled(num_layers)
    twins = both(dataclasses.replace(config, remat=remat))
    traced = [jax.jit(jax.grad(_hidden_loss(policy, batch))).trace(params) for policy in twins]
    for function in traced:
        assert str(function.jaxpr).count("remat") >= num_layers
    gradients = [program(params) for program in compile_traced(traced)]
    assert_trees_identical(*gradients)
    texts = [jax.jit(policy.hidden).lower(params, batch).as_text() for policy in twins]
    assert texts[0] == texts[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, gradients[0])


def test_rematerialisation_keeps_ever_less_for_the_backward_pass_in_either_flavour():
    """Counted between the passes, and compiled: there without the steps of XLA for CPU that merge the second forward
    pass of unrolled layers with the first, which it does on no other backend.
    """
    options = {"xla_disable_hlo_passes": "optimization-barrier-expander,cse,cse_barrier_expander"}
    config = tiny_config(num_layers=9, hidden_size=32, intermediate_size=96)
    few_layers = dataclasses.replace(config, num_layers=4, layer_types=config.layer_types[:4])
    few_params = noisy_params(few_layers)
    params, batch = noisy_params(config), plain_batch(num_tokens=64)
    kept, temporaries = {}, {"linen": {}, "nnx": {}}
    for remat in ("none", "dots", "outputs", "block", "full"):
        kept[remat], of_nnx = (
            sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], few_params)))
            for loss in (_hidden_loss(policy, batch) for policy in both(dataclasses.replace(few_layers, remat=remat)))
        )
        assert kept[remat] == of_nnx
        losses = [_hidden_loss(policy, batch) for policy in both(dataclasses.replace(config, remat=remat))]
        programs = compile_all(map(jax.grad, losses), params, compiler_options=options)
        for of_flavour, program in zip(temporaries.values(), programs, strict=True):
            of_flavour[remat] = program.memory_analysis().temp_size_in_bytes
    for of_flavour in temporaries.values():
        assert of_flavour["none"] > 2 * of_flavour["dots"] > 2 * of_flavour["outputs"]
        assert of_flavour["outputs"] > of_flavour["block"] > of_flavour["full"]
    assert sorted(kept, key=kept.__getitem__, reverse=True) == ["none", "dots", "outputs", "block", "full"]
    assert len(set(kept.values())) == 5
    assert kept["block"] < 0.1 * kept["none"]


def _hidden_loss(policy, batch):
    return lambda params: jnp.sum(jnp.sin(policy.hidden(params, batch)))


def test_replacing_an_nnx_layer_changes_the_nnx_run_only(monkeypatch):
    config = tiny_config()
    params, batch = noisy_params(config), plain_batch()
    linen, nnx_policy = both(config)
    before = run_hidden(linen, params, batch)
    monkeypatch.setattr(nnx_model.MLP, "__call__", lambda self, x_BTD: jnp.zeros_like(x_BTD))
    np.testing.assert_array_equal(run_hidden(linen, params, batch), before)
    assert float(jnp.abs(run_hidden(nnx_policy, params, batch) - before).max()) > 0.1


def test_replacing_a_linen_layer_changes_the_linen_run_only(monkeypatch):
    config = tiny_config()
    params, batch = noisy_params(config), plain_batch()
    linen, nnx_policy = both(config)
    before = run_hidden(nnx_policy, params, batch)
    monkeypatch.setattr(linen_model.MLP, "__call__", lambda self, x_BTD: jnp.zeros_like(x_BTD))
    np.testing.assert_array_equal(run_hidden(nnx_policy, params, batch), before)
    assert float(jnp.abs(run_hidden(linen, params, batch) - before).max()) > 0.1


def test_modules_work_by_hand_and_their_state_is_the_parameter_tree():
    config = tiny_config("gemma3_text")
    batch = plain_batch()
    model = nnx_model.CausalLM(config, nnx.Rngs(params=7))
    params = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.structure(params) == jax.tree.structure(ops.init_params(config, jax.random.key(0)))
    logits = nnx.jit(nnx_model.CausalLM.__call__)(model, batch)
    assert logits.shape == (3, 7, VOCAB)
    by_hand = jax.jit(linen_model.CausalLM(config).apply)({"params": params}, batch)
    np.testing.assert_array_equal(logits, by_hand)


@pytest.mark.parametrize("flavour", [False, True])
def test_a_parameter_tree_of_another_model_is_refused(flavour):
    policy, batch = create_policy(tiny_config(num_layers=3), flavour), plain_batch()
    with pytest.raises(ValueError, match="parameter layers_2 is missing"):
        policy.hidden(noisy_params(tiny_config(num_layers=2)), batch)
    with pytest.raises(ValueError, match="parameter layers_0/self_attn/q_proj/bias has no place"):
        policy.hidden(noisy_params(tiny_config("qwen2", num_layers=3)), batch)


# Types


@pytest.mark.parametrize("flavour", [False, True])
def test_float64_stays_float64_end_to_end(flavour):
    with jax.enable_x64(True):
        config = tiny_config("gemma3_text", dtype="float64", param_dtype="float64")
        policy, params, batch = create_policy(config, flavour), noisy_params(config), plain_batch()
        jaxpr = str(jax.make_jaxpr(lambda p: policy.unembed(p, policy.hidden(p, batch)))(params))
        assert ("f64[" in jaxpr, "f32[" in jaxpr) == (True, False)
        cached, cache = jax.jit(policy.extend)(params, batch, init_cache(config, 3, 8))
        assert cached.dtype == cache.own.layers[0].keys.dtype == jnp.float64
        np.testing.assert_allclose(cached, run_hidden(policy, params, batch), rtol=0, atol=1e-12)


def test_float64_is_refused_while_jax_keeps_to_32_bits():
    config = tiny_config(dtype="float64", param_dtype="float64")
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        ops.init_params(config, jax.random.key(0))


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits_near_the_float32_ones():
    config = tiny_config("qwen3")
    params, batch = noisy_params(config), plain_batch()
    low = NNXPolicy(dataclasses.replace(config, dtype="bfloat16"))
    hidden = run_hidden(low, params, batch)
    logits = low.unembed(params, hidden)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact = NNXPolicy(config).unembed(params, run_hidden(NNXPolicy(config), params, batch))
    assert float(jnp.abs(logits - exact).mean()) < 0.1 * float(jnp.abs(exact).mean())


# The attention rule


def test_visible_follows_group_branch_position_and_window():
    # prompt of two tokens, two branches of two tokens, one token of another group, one padding token
    positions = np.array([0, 1, 2, 3, 2, 3, 0, 0])
    groups = np.array([0, 0, 0, 0, 0, 0, 1, -1])
    branches = np.array([0, 0, 1, 1, 2, 2, 0, 0])
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 1],
        ],
        bool,
    )
    labels = tuple(jnp.asarray(x) for x in (positions, groups, branches))
    np.testing.assert_array_equal(ops.visible(*labels, *labels), expected)
    near = expected & (positions[:, None] - positions[None, :] < 2)
    np.testing.assert_array_equal(ops.visible(*labels, *labels, window=2), near)


def test_attention_is_the_textbook_sum_with_repeated_heads():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 5, 4, 8)), rng.normal(size=(2, 6, 2, 8)), rng.normal(size=(2, 6, 2, 8))
    mask = rng.random((2, 5, 6)) < 0.6
    mask[:, :, 0] = True
    with jax.enable_x64(True):
        got = ops.attention(*(jnp.asarray(x) for x in (q, k, v, mask)), scale=0.3)
    scores = 0.3 * np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2))
    weights = np.where(mask[:, None], np.exp(scores), 0.0)
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_gelu_and_rope_scaling_follow_their_formulas():
    x = jnp.linspace(-3, 3, 9)
    assert float(jnp.abs(ops.activation(x, "gelu") - ops.activation(x, "gelu_tanh")).max()) > 1e-5
    plain = ops.rope_frequencies(8, 100.0, RopeScaling())
    np.testing.assert_allclose(plain, [1.0, 100**-0.25, 0.1, 100**-0.75])
    linear = ops.rope_frequencies(8, 100.0, RopeScaling("linear", factor=4.0))
    np.testing.assert_allclose(linear, plain / 4)
    scaling = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    llama3 = ops.rope_frequencies(8, 100.0, scaling)
    # 5.1 turns: kept; 1.6 turns: blended; 0.5 and 0.16 turns: slowed
    blend = (32 * plain[1] / (2 * np.pi) - 1) / 3
    expected = [plain[0], blend * plain[1] + (1 - blend) * plain[1] / 8, plain[2] / 8, plain[3] / 8]
    np.testing.assert_allclose(llama3, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packing_and_padding_change_no_token(family):
    """Two prompts with two completions each: alone, and packed into one row with prompts shared and padding between."""
    config = tiny_config(family)
    params, hidden_of = noisy_params(config), jax.jit(NNXPolicy(config).hidden)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, 4), rng.integers(0, VOCAB, 2)]
    completions = [[rng.integers(0, VOCAB, n) for n in lengths] for lengths in ((3, 5), (4, 1))]
    tokens, positions, groups, branches, expected = [], [], [], [], []
    for group, (prompt, branch_tokens) in enumerate(zip(prompts, completions, strict=True)):
        parts = [(prompt, 0, 0)] + [(c, len(prompt), i + 1) for i, c in enumerate(branch_tokens)]
        parts.append((np.zeros(2, int), 0, 0))
        for i, (part, start, branch) in enumerate(parts):
            padding = i == len(parts) - 1
            tokens.extend(part)
            positions.extend(range(start, start + len(part)))
            groups.extend([-1 if padding else group] * len(part))
            branches.extend([branch] * len(part))
            alone = np.concatenate([prompt, part]) if branch else part
            if padding:
                expected.append(np.full((2, 16), np.nan))
                continue
            row = np.pad(alone, (0, 9 - len(alone)))[None]
            alone_groups = np.where(np.arange(9) < len(alone), 0, -1)[None]
            hidden = hidden_of(params, plain_inputs(row)._replace(group_ids_BT=alone_groups))
            expected.append(np.asarray(hidden[0, start : len(alone)]))
    packed = hidden_of(params, Inputs(*(np.asarray(x)[None] for x in (tokens, positions, groups, branches))))
    expected = np.concatenate(expected)
    real = np.array(groups) >= 0
    assert np.isfinite(packed).all()
    np.testing.assert_allclose(packed[0][real], expected[real], rtol=0, atol=2e-5)


def test_gradients_are_finite_when_a_row_is_all_padding():
    config = tiny_config("gemma3_text")
    policy, params = NNXPolicy(config), noisy_params(config)
    batch = plain_batch()
    tokens, groups = batch.tokens_BT, batch.group_ids_BT
    groups = groups.at[1].set(-1).at[2, 4:].set(-1)
    batch = batch._replace(group_ids_BT=groups)
    gradient = jax.jit(jax.grad(_hidden_loss(policy, batch)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # what padding computes reaches no real token
    hidden, other = (run_hidden(policy, params, batch._replace(tokens_BT=t)) for t in (tokens, tokens.at[2, 4:].set(3)))
    np.testing.assert_array_equal(other[2, :4], hidden[2, :4])
    assert float(jnp.abs(other[2, 4:] - hidden[2, 4:]).max()) > 0.01


# The cache


@pytest.mark.parametrize(("family", "flavour"), [("qwen2", True), ("gemma3_text", False)])
def test_decoding_with_a_shared_prefix_gives_the_hidden_states_of_whole_sequences(family, flavour):
    """Ragged prompts are prefilled once each; three samples per prompt then grow token by token, over a grown cache."""
    config = tiny_config(family)
    policy, params = create_policy(config, flavour), noisy_params(config)
    lengths_P, num_samples, num_new = np.array([5, 3]), 3, 4
    rng = np.random.default_rng(1)
    prompts_PT = rng.integers(0, VOCAB, (2, 5))
    new_BT = rng.integers(0, VOCAB, (6, num_new))
    positions_PT = np.broadcast_to(np.arange(5), (2, 5))
    groups_PT = np.where(positions_PT < lengths_P[:, None], 0, -1)
    extend = jax.jit(policy.extend)
    cache = init_cache(config, num_rows=2, length=5)
    prefill, cache = extend(params, plain_inputs(prompts_PT)._replace(group_ids_BT=groups_PT), cache)
    cache = init_cache(config, 6, 2, [kv.share_evenly(cache.own, 6)])
    assert cache.shared[0].part.layers[0].keys.shape == (2, 2, 8, 5)
    assert (cache.own.layers[0].keys.shape, cache.own.layers[0].values.shape) == ((6, 2, 8, 2), (6, 2, 2, 8))
    lengths_B, labels_B1 = np.repeat(lengths_P, num_samples), np.zeros((6, 1), int)
    decoded = []
    for step in range(num_new):
        if step == 2:
            own = kv.map_arrays(cache.own, lambda name, array: kv.pad_positions(name, array, 4))
            cache = dataclasses.replace(cache, own=own)
        inputs = Inputs(new_BT[:, step, None], (lengths_B + step)[:, None], labels_B1, labels_B1 + 1)
        hidden, cache = extend(params, inputs, cache)
        decoded.append(hidden[:, 0])
    assert cache.cursors.tolist() == [num_new] * 6
    whole_BT = np.zeros((6, 9), int)
    for row, length in enumerate(lengths_B):
        whole_BT[row, : length + num_new] = [*prompts_PT[row // num_samples, :length], *new_BT[row]]
    expected = jax.jit(policy.hidden)(params, plain_inputs(whole_BT))
    for row, length in enumerate(lengths_B):
        np.testing.assert_allclose(prefill[row // num_samples, :length], expected[row, :length], rtol=0, atol=2e-5)
        np.testing.assert_allclose(
            jnp.stack(decoded)[:, row], expected[row, length : length + num_new], rtol=0, atol=2e-5
        )


def test_decoding_copies_no_cache():
    """In the compiled decode loop the only operations as large as a layer's cache are its updates in place."""
    config = tiny_config(num_heads=4, num_kv_heads=2)
    policy, params = NNXPolicy(config), noisy_params(config)
    num_rows, length = 4, 256

    def decode(params, cache, tokens_B1):
        def step(carry):
            count, cache, tokens_B1 = carry
            labels = jnp.zeros_like(tokens_B1)
            hidden, cache = policy.extend(params, Inputs(tokens_B1, labels + count, labels, labels), cache)
            logits = policy.unembed(params, hidden[:, -1])
            return count + 1, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]

        return jax.lax.while_loop(lambda carry: carry[0] < 100, step, (jnp.int32(0), cache, tokens_B1))

    cache = init_cache(config, num_rows, length)
    arguments = params, cache, jnp.zeros((num_rows, 1), jnp.int32)
    compiled = jax.jit(decode, donate_argnums=1).lower(*arguments).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache.own.layers[0].keys.nbytes


def test_cache_sizes_that_do_not_fit_are_refused():
    cache = init_cache(tiny_config(), num_rows=2, length=4)
    with pytest.raises(ValueError, match="num_rows must be a multiple of the shared part's 2 rows, got 3"):
        kv.share_evenly(cache.own, 3)


# ModelConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"head_dim": None, "hidden_size": 18}, "give head_dim"),
        ({"family": "mamba"}, "family must be one of llama, qwen2, .*, got 'mamba'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"remat": "all"}, "remat must be one of none, dots, outputs, block, full, got 'all'"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"vocab_size": 0}, "vocab_size must be > 0, got 0"),
        ({"eos_token_ids": (1, 97)}, r"eos_token_ids must be in \[0, vocab_size = 97\), got 97"),
        ({"layer_types": ("full_attention",)}, "layer_types must name 2 layers"),
        ({"layer_types": ("sliding_attention",) * 2, "sliding_window": 4}, "gemma3_text, .* only, got family llama"),
        ({"family": "gemma3_text", "sliding_window": None}, "sliding_window must be >= 1"),
        ({"family": "qwen2", "attention_bias": False}, "attention_bias must be true for qwen2"),
        ({"family": "qwen3", "mlp_bias": True}, "mlp_bias must be false for qwen3"),
        ({"query_pre_attn_scalar": 3.0}, "query_pre_attn_scalar must equal head_dim"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_rope_scaling_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="rope_scaling kind must be one of"):
        RopeScaling("dynamic")
    with pytest.raises(ValueError, match="factor must be >= 1"):
        RopeScaling("linear", factor=0.5)
    with pytest.raises(ValueError, match="low_freq_factor < high_freq_factor"):
        RopeScaling("llama3", 8.0, low_freq_factor=4.0, high_freq_factor=1.0)


def test_every_sixth_gemma_layer_is_global():
    config = tiny_config("gemma3_text", num_layers=7, layer_types=None)
    assert [name == "full_attention" for name in config.layer_types] == [False] * 5 + [True, False]


# Scanned layers

SCANNED = {
    "llama": {},
    "qwen2": {"lora": LoRAConfig(2, 4.0, ("layers_[12]/self_attn/*_proj",))},  # three runs: 1, 2 and 2 layers of 5
    "gemma3_text": {"lora": LoRAConfig(2, 4.0, ("*_proj",), base_dtype="int8")},
    "qwen3": {},
}
WIDE = {"layer_types": None, "dtype": "float64", "param_dtype": "float64"}


# Five layers, so that "full" has segments of two and a shorter last one; of qwen2's, three runs: 1, 2 and 1 layers.
@pytest.mark.parametrize(
    ("family", "remat", "num_layers"),
    [
        ("llama", "none", 2),
        ("llama", "block", 2),
        ("qwen2", "dots", 4),
        ("gemma3_text", "full", 5),
        ("qwen3", "outputs", 2),
    ],
)
def test_scanned_layers_give_the_hidden_states_and_gradients_of_unrolled_ones(family, remat, num_layers):
    with jax.enable_x64(True):
        config = dataclasses.replace(tiny_config(family, num_layers=num_layers, **WIDE), **SCANNED[family])
        params, batch = freeze(config, noisy_params(config)), plain_batch()
        trained, frozen = split(config, params)
        scanned_config = dataclasses.replace(config, scan_layers=True, remat=remat)

        def loss_of(policy):
            return lambda trained: _hidden_loss(policy, batch)(join(trained, frozen))

        expected = jax.jit(jax.value_and_grad(loss_of(NNXPolicy(config))))(trained)
        twins = both(scanned_config)
        traced = [jax.jit(jax.value_and_grad(loss_of(policy))).trace(trained) for policy in twins]
        for program in (str(function.jaxpr) for function in traced):
            assert program.count("scan") >= len(scanned.layer_runs(config))
            assert ("remat" in program) == (remat != "none")
        programs = compile_traced(traced)
        assert programs[0] is programs[1]
        got = programs[0](trained)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), expected, got)


@pytest.mark.parametrize(
    ("family", "num_layers", "kv_dtype"),
    [
        ("qwen2", 4, "int8"),
        ("gemma3_text", 2, None),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("llama", 2, "int8"), ("qwen2", 4, None))),
    ],
)
def test_a_scanned_prefill_gives_the_hidden_states_and_the_cache_of_an_unrolled_one(family, num_layers, kv_dtype):
    """Two pieces after a common prefix that all rows share; then a token alone, which no loop runs over."""
    with jax.enable_x64(True):
        config = dataclasses.replace(tiny_config(family, num_layers=num_layers, **WIDE), **SCANNED[family])
        params = freeze(config, noisy_params(config))
        batch = plain_batch(num_tokens=11)

        def steps(policy, params):
            _, prefix = policy.extend(
                params,
                Inputs(*(x[:1, :3] for x in batch)),
                init_cache(config, 1, 3, (), kv_dtype),
            )
            cache = init_cache(config, 3, 8, [kv.share_evenly(prefix.own, 3, any_group=True)], kv_dtype)
            hiddens = []
            for start, stop in ((3, 7), (7, 10), (10, 11)):
                hidden, cache = policy.extend(params, Inputs(*(x[:, start:stop] for x in batch)), cache)
                hiddens.append(hidden)
            return hiddens, cache.own

        expected = jax.jit(steps, static_argnums=0)(NNXPolicy(config), params)
        twins = both(dataclasses.replace(config, scan_layers=True, remat="full"))
        traced = [jax.jit(functools.partial(steps, policy)).trace(params) for policy in twins]
        for function in traced:
            scans = sum(equation.primitive.name == "scan" for equation in function.jaxpr.eqns)
            assert scans == 3 * len(scanned.layer_runs(config))
        programs = compile_traced(traced)
        assert programs[0] is programs[1]
        got = programs[0](params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), expected, got)


def test_layers_are_scanned_in_runs_of_equal_structure():
    config = dataclasses.replace(tiny_config("qwen2", num_layers=5), **SCANNED["qwen2"])
    assert scanned.layer_runs(config) == [range(1), range(1, 3), range(3, 5)]
    assert scanned.layer_runs(dataclasses.replace(config, lora=None)) == [range(5)]


def test_rematerialised_scanned_layers_save_memory_on_cpu_and_any_number_of_them_compiles_to_one():
    config = dataclasses.replace(tiny_config(num_layers=16), scan_layers=True)
    params, batch = noisy_params(config), plain_batch(num_rows=32, num_tokens=64)
    temporaries = {}
    for remat in ("none", "block", "full"):
        twins = both(dataclasses.replace(config, remat=remat))
        programs = compile_all([jax.grad(_hidden_loss(policy, batch)) for policy in twins], params)
        assert programs[0] is programs[1]
        temporaries[remat] = programs[0].memory_analysis().temp_size_in_bytes
    assert temporaries["none"] > 2 * temporaries["block"] > 2 * temporaries["full"]
    short = dataclasses.replace(config, num_layers=4, layer_types=config.layer_types[:4])
    for flavour in (True, False):
        sizes = [
            str(jax.make_jaxpr(create_policy(c, flavour).hidden)(noisy_params(c), batch)).count("dot_general")
            for c in (short, config)
        ]
        assert sizes[0] == sizes[1]
