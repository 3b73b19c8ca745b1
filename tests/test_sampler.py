"""Completions against a plain full forward pass, and against themselves in other company."""

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rl.config import load_config
from rl.mesh import create_mesh, tree_shardings
from rl.models.config import ModelConfig, logical_axes
from rl.models.policy import Policy, create_policy
from rl.sampler import Completion, Sampler
from rl.sampling import SamplingParams, truncate
from rl.waves import Row, plan_waves, size_at_least, size_at_most, stop_length

VOCAB = 48
PLAIN = SamplingParams(
    temperature=0.8,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    max_completion_length=24,
    min_completion_length=0,
    stop_strings=(),
    eos_ids=(1, 2),
)
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 9, 8], [11] * 13, [20]]
NUM_SAMPLES = 4
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"num_layers": 2, "layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6},
}
LETTERS = dict(enumerate(string.ascii_letters[: VOCAB - 3], start=3))


def decode_text(token_ids: Sequence[int]) -> str:
    return "".join(LETTERS.get(int(token), "") for token in token_ids)


class Setup(NamedTuple):
    policy: Policy
    params: Any
    mesh: jax.sharding.Mesh
    shardings: Any
    forward: Callable[..., jax.Array]
    sampler: Any


def build(family: str = "qwen3", pure_nnx: bool = True, mesh: tuple[str, ...] = (), **changes) -> Setup:
    """A tiny random policy; on one device unless `mesh` has overrides of the config for eight."""
    config = load_config(None, mesh)
    device_mesh = create_mesh(config.mesh, jax.devices() if mesh else jax.devices()[:1])
    max_rows = changes.pop("max_rows", 64)
    arch = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4}
    arch |= {"num_kv_heads": 2, "head_dim": 8, **FAMILIES[family], **changes}
    policy = create_policy(ModelConfig.from_arch(family, **arch), pure_nnx)
    abstract = jax.eval_shape(policy.init, jax.random.key(0))
    shardings = tree_shardings(abstract, logical_axes(policy.config), device_mesh, config.mesh.rules)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape), abstract)
    # Far enough from 0 that attention and MLP matter, hence ragged lengths and distributions that are not uniform.
    params = jax.tree.map(
        lambda value, leaf, sharding: jax.device_put(value.astype(leaf.dtype), sharding), params, abstract, shardings
    )

    def forward(params: Any, *labels_BT: jax.Array) -> jax.Array:
        return policy.unembed(params, policy.hidden(params, *labels_BT))

    setup = Setup(policy, params, device_mesh, shardings, jax.jit(forward), None)
    return with_sampler(setup, rules=config.mesh.rules, max_rows=max_rows)


def with_sampler(setup: Setup, **options) -> Setup:
    """The same policy with a sampler of its own."""
    defaults = {"rules": load_config(None).mesh.rules, "decode_text": decode_text, "max_rows": 64, "stop_chunk": 5}
    return setup._replace(sampler=Sampler(setup.policy, setup.mesh, setup.shardings, **{**defaults, **options}))


def sample(setup: Setup, sampling: SamplingParams = PLAIN, prompts=PROMPTS, num_samples: int = NUM_SAMPLES, **options):
    return setup.sampler.sample(setup.params, prompts, num_samples, sampling, jax.random.key(7), **options)


def changed(**changes) -> SamplingParams:
    return dataclasses.replace(PLAIN, **changes)


def flatten(completions: list[list[Completion]]) -> list[Completion]:
    return [completion for group in completions for completion in group]


def assert_same(left: Sequence[Completion], right: Sequence[Completion], tolerance: float = 0.0) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=0, atol=tolerance)
        np.testing.assert_allclose(a.policy_logprobs, b.policy_logprobs, rtol=0, atol=tolerance)


def full_forward_logits(setup: Setup, prompt: Sequence[int], group: list[Completion]) -> list[np.ndarray]:
    """Logits [L, V] behind each token of each completion, from one packed row: the prompt, then every completion."""
    length = 256
    tokens, positions, groups, branches = (np.zeros((1, length), np.int32) for _ in range(4))
    groups[:] = -1
    cursor = 0
    segments = [(0, 0, list(prompt))]
    segments += [(c.sample_index + 1, len(prompt), c.token_ids.tolist()) for c in group]
    starts = []
    for branch, first_position, ids in segments:
        span = slice(cursor, cursor + len(ids))
        tokens[0, span], groups[0, span], branches[0, span] = ids, 0, branch
        positions[0, span] = first_position + np.arange(len(ids))
        starts.append(cursor)
        cursor += len(ids)
    logits_TV = np.asarray(setup.forward(setup.params, tokens, positions, groups, branches)[0])
    result = []
    for start, completion in zip(starts[1:], group, strict=True):
        # The first token is predicted at the last position of the prompt, the next ones by the completion itself.
        behind = [len(prompt) - 1, *range(start, start + len(completion.token_ids) - 1)]
        result.append(logits_TV[behind])
    return result


def logprobs_of(scores_LV: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Log-softmax of the scores at the tokens [L], in float64."""
    scores_LV = scores_LV.astype(np.float64)
    highest_L1 = scores_LV.max(axis=-1, keepdims=True)
    total_L = np.log(np.sum(np.exp(scores_LV - highest_L1), axis=-1)) + highest_L1[:, 0]
    return np.take_along_axis(scores_LV, token_ids[:, None], axis=1)[:, 0] - total_L


def logprob_differences(setup: Setup, completions, temperature: float) -> np.ndarray:
    differences = []
    for prompt, group in zip(PROMPTS, completions, strict=True):
        for completion, logits_LV in zip(group, full_forward_logits(setup, prompt, group), strict=True):
            expected_L = logprobs_of(logits_LV / temperature, completion.token_ids)
            differences.append(np.abs(expected_L - completion.policy_logprobs))
    return np.concatenate(differences)


@pytest.fixture(scope="module")
def qwen() -> Setup:
    return build("qwen3")


@pytest.fixture(scope="module")
def qwen_completions(qwen) -> list[list[Completion]]:
    return sample(qwen)


# Against the full forward pass


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logprobs_are_those_of_the_full_forward_pass_and_flavours_agree_bit_for_bit(family):
    setups = [build(family, pure_nnx) for pure_nnx in (True, False)]
    nnx, linen = (sample(setup) for setup in setups)
    assert_same(flatten(nnx), flatten(linen))
    lengths = {len(completion.token_ids) for completion in flatten(nnx)}
    assert len(lengths) > 1, "ragged lengths make the test worth something"
    differences = logprob_differences(setups[0], nnx, PLAIN.temperature)
    assert differences.mean() <= 1e-6
    assert differences.max() <= 1e-4


@pytest.mark.parametrize(("family", "pure_nnx"), [("gemma3_text", True), ("llama", False)])
def test_float64_logprobs_are_those_of_the_full_forward_pass_to_ten_digits(family, pure_nnx):
    with jax.enable_x64(True):
        setup = build(family, pure_nnx, dtype="float64", param_dtype="float64")
        completions = sample(setup)
        assert completions[0][0].policy_logprobs.dtype == np.float64
        assert logprob_differences(setup, completions, PLAIN.temperature).max() <= 1e-10


def test_greedy_equals_a_naive_argmax_loop(qwen):
    greedy = changed(temperature=0.0, max_completion_length=12)
    completions = sample(qwen, greedy, num_samples=1)
    for prompt, (completion,) in zip(PROMPTS, completions, strict=True):
        ids, positions = list(prompt), np.arange(32, dtype=np.int32)[None]
        while len(ids) < len(prompt) + 12 and ids[len(prompt) :][-1:] not in ([1], [2]):
            tokens = np.array([ids + [0] * (32 - len(ids))], np.int32)
            zeros = np.zeros_like(tokens)
            logits_TV = np.asarray(qwen.forward(qwen.params, tokens, positions, zeros, zeros)[0])
            ids.append(int(logits_TV[len(ids) - 1].argmax()))
        assert completion.token_ids.tolist() == ids[len(prompt) :]
        assert not completion.sampler_logprobs.any()
    assert logprob_differences(qwen, completions, 1.0).max() <= 1e-4


def test_truncated_sampling_reports_the_distribution_really_drawn_from_and_the_plain_one(qwen):
    sampling = changed(top_k=9, top_p=0.8, min_p=0.02)
    completions = sample(qwen, sampling)
    jitted_truncate = jax.jit(truncate, static_argnums=1)
    num_truncated = 0
    for prompt, group in zip(PROMPTS, completions, strict=True):
        for completion, logits_LV in zip(group, full_forward_logits(qwen, prompt, group), strict=True):
            padded_LV = np.resize(logits_LV, (sampling.max_completion_length, VOCAB))  # one shape, one compilation
            kept_LV = np.asarray(jitted_truncate(padded_LV / np.float32(sampling.temperature), sampling))
            expected_L = logprobs_of(kept_LV[: len(logits_LV)], completion.token_ids)
            np.testing.assert_allclose(completion.sampler_logprobs, expected_L, atol=1e-4)
            num_truncated += np.sum(completion.sampler_logprobs > completion.policy_logprobs + 0.01)
    assert num_truncated > 100
    assert logprob_differences(qwen, completions, sampling.temperature).max() <= 1e-4


def test_first_tokens_follow_the_models_distribution(qwen):
    num_samples = 2048
    sampling = changed(max_completion_length=1)
    (group,) = sample(qwen, sampling, prompts=[PROMPTS[1]], num_samples=num_samples)
    logits_V = full_forward_logits(qwen, PROMPTS[1], group[:1])[0][0]
    probs_V = np.exp(logprobs_of(np.tile(logits_V / sampling.temperature, (VOCAB, 1)), np.arange(VOCAB)))
    counts_V = np.bincount([int(c.token_ids[0]) for c in group], minlength=VOCAB)
    common_V = probs_V * num_samples >= 5
    rest = num_samples * probs_V[~common_V].sum()
    expected = np.append(num_samples * probs_V[common_V], rest)
    observed = np.append(counts_V[common_V], counts_V[~common_V].sum())
    chi_square = np.sum((observed - expected) ** 2 / np.maximum(expected, 1e-9))
    degrees = len(expected) - 1
    assert degrees >= 5
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


# The same completion in any company


def test_a_completion_is_the_same_in_another_order_and_in_small_waves(qwen, qwen_completions):
    reordered = sample(qwen, prompts=PROMPTS[::-1], prompt_indices=[3, 2, 1, 0])
    assert [group[0].prompt_index for group in reordered] == [3, 2, 1, 0]
    assert_same(flatten(reordered[::-1]), flatten(qwen_completions), 1e-5)
    # Two rows at a time: the four samples of a prompt are cut into two groups.
    small_waves = sample(with_sampler(qwen, max_rows=2, chunk=5))
    assert_same(flatten(small_waves), flatten(qwen_completions), 1e-5)


def test_rows_differ_by_sample_prompt_index_and_key(qwen, qwen_completions):
    for group in qwen_completions:
        assert len({tuple(c.token_ids.tolist()) for c in group}) == NUM_SAMPLES
    again = sample(qwen, prompts=[PROMPTS[0]], prompt_indices=[9])
    assert again[0][0].token_ids.tolist() != qwen_completions[0][0].token_ids.tolist()
    other_key = qwen.sampler.sample(qwen.params, PROMPTS, NUM_SAMPLES, PLAIN, jax.random.key(8))
    assert other_key[0][0].token_ids.tolist() != qwen_completions[0][0].token_ids.tolist()


def test_a_long_completion_outlives_several_sizes_of_the_cache(qwen):
    sampling = changed(eos_ids=(), max_completion_length=70)
    completions = sample(qwen, sampling, num_samples=1)
    own_slots = {name[2][1] for name in qwen.sampler._compiled if name[0] == "decode" and name[4] == sampling}
    assert own_slots == {32, 64, 96}
    assert all(len(c.token_ids) == 70 and c.finish_reason == "length" for c in flatten(completions))
    assert logprob_differences(qwen, completions, sampling.temperature).max() <= 1e-4


def test_dropping_finished_rows_changes_nothing(qwen):
    # So many tokens end a completion that most of the 64 rows finish early and a few go on.
    sampling = changed(eos_ids=(0, 1, 2, 3, 4), max_completion_length=32)
    setup = with_sampler(qwen, chunk=8)
    dropping = flatten(sample(setup, sampling, num_samples=16))
    assert "select" in {name[0] for name in setup.sampler._compiled}
    assert 0 < sum(len(c.token_ids) > 20 for c in dropping) < 32
    never_dropping = flatten(sample(with_sampler(qwen, max_rows=16), sampling, num_samples=16))
    assert_same(dropping, never_dropping, 1e-5)


@pytest.mark.parametrize("mesh", [("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), ("mesh.fsdp=8",)])
def test_eight_devices_draw_the_same_completions(mesh, qwen_completions):
    setup = build("qwen3", mesh=mesh)
    completions = sample(setup)
    assert_same(flatten(completions), flatten(qwen_completions), 1e-5)


# How completions end


def test_eos_is_kept_and_nothing_follows(qwen_completions):
    reasons = [c.finish_reason for c in flatten(qwen_completions)]
    assert {"eos", "length"} <= set(reasons)
    last_tokens = set()
    for completion in flatten(qwen_completions):
        ids = completion.token_ids.tolist()
        assert len(ids) == len(completion.sampler_logprobs) == len(completion.policy_logprobs)
        assert not {1, 2} & set(ids[:-1])
        if completion.finish_reason == "eos":
            last_tokens.add(ids[-1])
        else:
            assert len(ids) == PLAIN.max_completion_length
            assert ids[-1] not in (1, 2)
    assert last_tokens == {1, 2}


def test_no_completion_ends_before_the_minimum_length(qwen):
    sampling = changed(min_completion_length=9, eos_ids=tuple(range(0, VOCAB, 2)), stop_strings=("e",))
    completions = flatten(sample(qwen, sampling))
    lengths = [len(c.token_ids) for c in completions]
    assert min(lengths) == 10
    assert {c.finish_reason for c in completions} <= {"eos", "stop"}
    # While the end is forbidden, the distribution drawn from is not the plain one.
    assert all(np.all(c.sampler_logprobs[:9] > c.policy_logprobs[:9]) for c in completions)


def test_stop_strings_end_a_completion_at_the_token_that_completes_them(qwen, qwen_completions):
    texts = [decode_text(c.token_ids) for c in flatten(qwen_completions)]
    stop = next(text[5:7] for text in texts if len(text) > 12)
    stopped = flatten(sample(qwen, changed(stop_strings=("??", stop))))
    num_stops = 0
    for completion, free, text in zip(stopped, flatten(qwen_completions), texts, strict=True):
        if stop in text:
            assert completion.finish_reason == "stop"
            kept = next(n for n in range(len(text) + 1) if stop in decode_text(free.token_ids[:n]))
            assert completion.token_ids.tolist() == free.token_ids[:kept].tolist()
            num_stops += 1
        else:
            assert_same([completion], [free], 1e-5)
    assert 0 < num_stops < len(stopped)


def test_stop_length_finds_the_first_completing_token_across_boundaries():
    pieces = {1: "ab", 2: "cd", 3: "", 4: "e"}

    def text(ids: Sequence[int]) -> str:
        return "".join(pieces[i] for i in ids)

    def find(ids, stops, num_checked=0, minimum=0):
        return stop_length(ids, num_checked, changed(stop_strings=stops, min_completion_length=minimum), text)

    assert find([1, 2, 4], ("bc",)) == 2
    assert find([1, 3, 2, 4], ("bc", "de")) == 3
    assert find([1, 2, 4], ("abcde",)) == 3
    assert find([1, 2, 4], ("x",)) is None
    assert find([1, 2, 4], ("de",), num_checked=2) == 3
    # Completed by the first two tokens: does not count. Reaching into them: counts.
    assert find([1, 2, 4], ("bc",), minimum=2) is None
    assert find([1, 2, 1, 2], ("bc",), minimum=2) == 4
    assert find([1, 2, 4], ("cde",), minimum=2) == 3
    assert find([1, 2], ("bc",), minimum=2) is None


# Shapes, waves and input


def test_a_second_call_compiles_nothing_and_leaves_the_parameters_alone(qwen):
    sample(qwen)
    num_compiles = qwen.sampler.num_compiles
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = sample(qwen)
        other_lengths = sample(qwen, prompts=[[3] * 2, [4] * 7, [5] * 16, [6] * 11])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(flatten(first)) == len(flatten(other_lengths)) == 16
    assert qwen.sampler.num_compiles == num_compiles
    assert not compiled
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(qwen.params))


def test_bfloat16_draws_with_float32_logprobs():
    setup = build("qwen3", dtype="bfloat16", param_dtype="bfloat16")
    completions = sample(setup, changed(max_completion_length=8))
    assert all(c.policy_logprobs.dtype == np.float32 for c in flatten(completions))
    assert all(np.isfinite(c.policy_logprobs).all() for c in flatten(completions))
    assert logprob_differences(setup, completions, PLAIN.temperature).mean() < 0.1


@pytest.mark.parametrize("num_shards", [1, 2, 8])
@pytest.mark.parametrize(("num_prompts", "num_samples", "max_rows"), [(5, 4, 16), (1, 8, 64), (3, 20, 8), (40, 8, 256)])
def test_waves_hold_every_row_once_and_stay_within_the_limit(num_prompts, num_samples, max_rows, num_shards):
    waves = plan_waves(num_prompts, num_samples, max_rows, num_shards)
    rows = [row for wave in waves for group in wave for row in group]
    assert rows == [Row(p, g) for p in range(num_prompts) for g in range(num_samples)]
    for wave in waves:
        padded_groups = num_shards * size_at_least(-(-len(wave) // num_shards))
        assert padded_groups * max(map(len, wave)) <= max_rows
        assert all(len({row.prompt for row in group}) == 1 for group in wave)
    if num_shards == 1 and num_samples <= max_rows:
        assert all(len(group) == num_samples for wave in waves for group in wave)


def test_sizes_are_few_and_close():
    assert [size_at_least(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)] == [
        1,
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        12,
        16,
        24,
        32,
    ]
    assert [size_at_most(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)] == [1, 2, 3, 4, 4, 6, 6, 8, 12, 16, 24]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[3], []], {}, r"prompts\[1\] must have at least one token"),
        ([[3, VOCAB]], {}, r"prompts\[0\] must have token ids in \[0, 48\), got 3 to 48"),
        ([[-1]], {}, "got -1 to -1"),
        ([[3] * 10], {"max_completion_length": 5000}, "must fit in the model's 4096 positions, got 10 [+] 5000"),
        ([[3]], {"eos_ids": (VOCAB,)}, "eos_ids must be below the vocabulary size 48"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(qwen, prompts, changes, message):
    num_compiles = qwen.sampler.num_compiles
    with pytest.raises(ValueError, match=message):
        sample(qwen, changed(**changes), prompts)
    assert qwen.sampler.num_compiles == num_compiles


def test_bad_arguments_are_refused(qwen):
    with pytest.raises(ValueError, match="num_samples must be >= 1"):
        sample(qwen, num_samples=0)
    with pytest.raises(ValueError, match="prompt_indices must have one entry for each of 4 prompts, got 1"):
        sample(qwen, prompt_indices=[1])
    with pytest.raises(ValueError, match="max_rows must be >= 8"):
        build(mesh=("mesh.fsdp=8",), max_rows=4)
    assert sample(qwen, prompts=[]) == []
    with pytest.raises(ValueError, match="stop_strings needs a tokenizer"):
        sample(with_sampler(qwen, decode_text=None), changed(stop_strings=("a",)))
