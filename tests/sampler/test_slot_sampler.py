"""Completions against a plain full forward pass, and against themselves in other company."""

import contextlib
import dataclasses
import functools
import math
import re
import string
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.devices.programs import Build, Programs, use_compilation_cache
from rl.models.config import ModelConfig, Quantization, logical_axes
from rl.models.flavours import create_policy
from rl.models.inputs import Inputs
from rl.models.policy import Policy
from rl.models.quantized import quantize_params
from rl.sampler.contract import Request, requests_for
from rl.sampler.slot_sampler import Completion, Sampler
from rl.sampler.token_draw import SamplingParams, truncate

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


class SharedPrograms(Programs):
    """The programs of one sampler. What another one of the same policy has built is taken from `built`."""

    def __init__(self, built: Programs) -> None:
        super().__init__()
        self._built = built

    def get(self, key: Hashable, build: Build) -> Any:
        return super().get(key, lambda: self._built.get(key, build))

    def prepare(self, key: Hashable, build: Build) -> None:
        super().prepare(key, lambda: self._built.get(key, build))


class Setup(NamedTuple):
    policy: Policy
    params: Any
    mesh: jax.sharding.Mesh
    shardings: Any
    forward: Callable[..., jax.Array]
    rules: Any
    built: dict[Any, Programs]  # of all samplers, by the options on which programs depend
    sampler: Any


def build(family: str = "qwen3", pure_nnx: bool = True, mesh: tuple[str, ...] = (), **changes) -> Setup:
    """A tiny random policy; on one device unless `mesh` has overrides of the config for eight."""
    config = load_config(None, mesh)
    device_mesh = create_mesh(config.mesh, jax.devices() if mesh else jax.devices()[:1])
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
        return policy.unembed(params, policy.hidden(params, Inputs(*labels_BT)))

    return with_sampler(Setup(policy, params, device_mesh, shardings, jax.jit(forward), config.mesh.rules, {}, None))


def with_sampler(setup: Setup, **options) -> Setup:
    """The same policy with a sampler of its own. Eight slots of a shard are never dropped, which takes programs."""
    defaults = {"rules": setup.rules, "decode_text": decode_text, "stop_chunk": 5, "slots": 8}
    sampler = Sampler(setup.policy, setup.mesh, setup.shardings, **{**defaults, **options})
    kind = options.get("kv_dtype"), options.get("weights")
    sampler.engine.programs = SharedPrograms(setup.built.setdefault(kind, Programs()))
    return setup._replace(sampler=sampler)


def sample(setup: Setup, sampling: SamplingParams = PLAIN, prompts=PROMPTS, num_samples: int = NUM_SAMPLES, **options):
    return setup.sampler.sample(setup.params, prompts, num_samples, sampling, jax.random.key(7), **options)


def changed(**changes) -> SamplingParams:
    return dataclasses.replace(PLAIN, **changes)


def record_reports(setup: Setup) -> list[Any]:
    """What the engine reports to the host from now on, chunk by chunk."""
    reports, generate = [], setup.sampler.engine.generate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        state, report = generate(*args, **kwargs)
        reports.append(report)
        return state, report

    setup.sampler.engine.generate = recorded
    return reports


def record_prefills(setup: Setup) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, group ids) of every prefill from now on."""
    inputs, prefill = [], setup.sampler.engine.prefill

    def recorded(params: Any, rows: Inputs, **kwargs: Any) -> Any:
        inputs.append((rows.tokens_BT, rows.group_ids_BT))
        return prefill(params, rows, **kwargs)

    setup.sampler.engine.prefill = recorded
    return inputs


def flatten(completions: list[list[Completion]]) -> list[Completion]:
    return [completion for group in completions for completion in group]


def assert_same(left: Sequence[Completion], right: Sequence[Completion], tolerance: float = 0.0) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=0, atol=tolerance)
        np.testing.assert_allclose(a.policy_logprobs, b.policy_logprobs, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(a.top_ids, b.top_ids)
        np.testing.assert_allclose(a.top_logprobs, b.top_logprobs, rtol=0, atol=tolerance)


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


def logprob_differences(setup: Setup, completions, temperature: float, prompts=PROMPTS) -> np.ndarray:
    differences = []
    for prompt, group in zip(prompts, completions, strict=True):
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


@pytest.fixture(scope="module")
def sharded_qwen() -> Setup:
    return build("qwen3", pure_nnx=False, mesh=("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"))


@pytest.fixture(scope="module")
def one_device(qwen, qwen_completions) -> Callable[[str], tuple[Setup, list[list[Completion]]]]:
    """A family's NNX policy on one device and its completions, drawn once."""

    @functools.cache
    def drawn(family: str) -> tuple[Setup, list[list[Completion]]]:
        if family == "qwen3":
            return qwen, qwen_completions
        setup = build(family)
        return setup, sample(setup)

    return drawn


def one_at_a_time(setup: Setup, longest: int, **options) -> Callable[..., list[list[Completion]]]:
    """A function that draws each of some prompts in a call of its own; all calls have the shapes of one plan.

    longest: tokens of the longest prompt. options: of the sampler.
    """
    setup = with_sampler(setup, **options)
    setup.sampler.expect_length(longest, 1, NUM_SAMPLES)

    def drawn(prompts: dict[int, Sequence[int]], num_samples: int = NUM_SAMPLES) -> list[list[Completion]]:
        """prompts: by their index."""
        return [
            sample(setup, prompts=[prompt], num_samples=num_samples, prompt_indices=[i])[0]
            for i, prompt in prompts.items()
        ]

    return drawn


@pytest.fixture(scope="module")
def alone(qwen) -> Callable[..., list[list[Completion]]]:
    return one_at_a_time(qwen, 250)


# Against the full forward pass


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logprobs_are_those_of_the_full_forward_pass_and_flavours_agree_bit_for_bit(family, one_device):
    setup, nnx = one_device(family)
    linen = sample(build(family, pure_nnx=False))
    assert_same(flatten(nnx), flatten(linen))
    lengths = {len(completion.token_ids) for completion in flatten(nnx)}
    assert len(lengths) > 1, "ragged lengths make the test worth something"
    differences = logprob_differences(setup, nnx, PLAIN.temperature)
    assert differences.mean() <= 1e-6
    assert differences.max() <= 1e-4


@pytest.mark.parametrize(
    ("family", "pure_nnx"), [("gemma3_text", True), pytest.param("llama", False, marks=pytest.mark.long)]
)
def test_float64_logprobs_are_those_of_the_full_forward_pass_to_ten_digits(family, pure_nnx):
    with jax.enable_x64(True):
        setup = build(family, pure_nnx, dtype="float64", param_dtype="float64")
        completions = sample(setup)
        assert completions[0][0].policy_logprobs.dtype == np.float64
        assert logprob_differences(setup, completions, PLAIN.temperature).max() <= 1e-10
        # Cut anywhere and continued, each completion is what it was in one go.
        wholes, requests = flatten(completions), requests_for(range(len(PROMPTS)), NUM_SAMPLES, 24)
        cuts = [i % len(whole.token_ids) for i, whole in enumerate(wholes)]
        for i, (whole, cut) in enumerate(zip(wholes, cuts, strict=True)):
            requests[i] = dataclasses.replace(requests[i], continues=tuple(whole.token_ids[:cut].tolist()))
        rests = dict(setup.sampler.stream(setup.params, PROMPTS, requests, PLAIN, jax.random.key(7)))
        for i, (whole, cut) in enumerate(zip(wholes, cuts, strict=True)):
            assert rests[i].token_ids.tolist() == whole.token_ids[cut:].tolist()
            np.testing.assert_allclose(rests[i].policy_logprobs, whole.policy_logprobs[cut:], rtol=0, atol=1e-10)


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


def test_a_completion_is_the_same_in_another_order_and_in_one_slot(qwen, qwen_completions):
    reordered = sample(qwen, prompts=PROMPTS[::-1], prompt_indices=[3, 2, 1, 0])
    assert [group[0].prompt_index for group in reordered] == [3, 2, 1, 0]
    assert_same(flatten(reordered[::-1]), flatten(qwen_completions), 1e-5)
    one_slot = with_sampler(qwen, slots=1, chunk=7)
    assert_same(flatten(sample(one_slot)), flatten(qwen_completions), 1e-5)


def test_a_slot_takes_the_next_request_inside_a_chunk(qwen, qwen_completions):
    setup = with_sampler(qwen, slots=4, chunk=512)
    reports = record_reports(setup)
    assert_same(flatten(sample(setup)), flatten(qwen_completions), 1e-5)
    # One chunk draws all 16 completions in 4 slots, but for a look when nobody waits any more.
    assert len(reports) <= 3
    drawn = sum(len(c.token_ids) for c in flatten(qwen_completions))
    num_steps = sum(int(report.num_steps) for report in reports)
    assert num_steps < drawn / 4 + PLAIN.max_completion_length
    # Nobody waits before the queue is empty: every slot draws in every step until then.
    busy = np.concatenate([np.asarray(report.columns.request_ids)[: report.num_steps] >= 0 for report in reports])
    assert busy[: num_steps - PLAIN.max_completion_length].all()


def test_a_long_queue_streams_through_a_table_of_constant_size(qwen):
    prompts = [[3 + i % 40, 6, 7 + i % 30, *([9] * (i % 5))] for i in range(60)]
    setup = with_sampler(qwen, slots=4)
    few = sample(setup, prompts=prompts[:12], num_samples=1)
    peak = setup.sampler.peak_kv_bytes
    many = sample(setup, prompts=prompts, num_samples=1)
    assert setup.sampler.peak_kv_bytes == peak
    assert_same(flatten(few), flatten(many[:12]), 1e-5)
    assert logprob_differences(setup, many, PLAIN.temperature, prompts=prompts).max() <= 1e-4


def test_one_prompt_of_many_samples_leaves_no_slot_idle_for_long(qwen):
    """Requests of one token take a step each: eight slots draw 32 of them in four steps, and in a few more at most."""
    counts = (8, *[1] * 24)
    requests = [Request(p, p, s, 1) for p, count in enumerate(counts) for s in range(count)]
    setup = with_sampler(qwen, slots=8)
    reports = record_reports(setup)
    prompts = [[3 + p] for p in range(len(counts))]
    drawn = setup.sampler.stream(setup.params, prompts, requests, changed(max_completion_length=1), jax.random.key(0))
    assert len(list(drawn)) == len(requests)
    assert sum(int(report.num_steps) for report in reports) <= 6


def test_a_common_prefix_is_cached_once_and_changes_nothing(qwen, alone):
    rng = np.random.default_rng(3)
    head = rng.integers(3, VOCAB, 100).tolist()
    prompts = [[*head, 5, 6], [*head, 7], [*head, 8, 9, 10, 11]]
    before = set(qwen.sampler.engine.programs)
    shared = sample(qwen, prompts=prompts)
    shapes = {name[1] for name in set(qwen.sampler.engine.programs) - before if name[0] == "generate"}
    assert {(shape.common_length, shape.table_length) for shape in shapes} == {(96, 16)}
    assert_same(flatten(shared), flatten(alone(dict(enumerate(prompts)))), 1e-5)
    held = sum(array.nbytes for array in jax.live_arrays())
    sample(qwen)
    given_back = held - sum(array.nbytes for array in jax.live_arrays())
    assert given_back == 96 * qwen.sampler.engine.bytes_per_position(), "a call without a prefix has its memory"


def test_a_common_prefix_is_prefilled_once_for_the_same_weights(qwen):
    rng = np.random.default_rng(3)
    head = rng.integers(3, VOCAB, 100).tolist()
    prompts = [[*head, 5, 6], [*head, 7]]
    setup = with_sampler(qwen)
    calls = record_prefills(setup)

    def prefixes() -> int:
        return sum(tokens_PT.tolist() == [head[:96]] for tokens_PT, _ in calls)

    first = sample(setup, prompts=prompts)
    turned = sample(setup, prompts=prompts[::-1], prompt_indices=[1, 0])[::-1]
    assert_same(flatten(turned), flatten(first), 1e-5)  # other rows of the table may round differently
    assert prefixes() == 1
    doubled = setup._replace(params=jax.tree.map(lambda leaf: leaf * 2, setup.params))
    others = sample(doubled, prompts=prompts)
    assert prefixes() == 2
    held = sum(array.nbytes for array in jax.live_arrays())
    setup.sampler.release()
    released = held - sum(array.nbytes for array in jax.live_arrays())
    assert released == 96 * setup.sampler.engine.bytes_per_position()
    assert_same(flatten(others), flatten(sample(doubled, prompts=prompts)))  # the sampler had nothing to use again
    assert prefixes() == 3
    assert_same(flatten(sample(setup, prompts=prompts)), flatten(first))
    assert prefixes() == 4


def test_prompts_of_different_lengths_share_rows_of_the_table(qwen, alone):
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (65, 9, 17, 11, 14, 16, 8, 10)]
    setup = with_sampler(qwen)
    tables = record_prefills(setup)
    packed = sample(setup, prompts=prompts, num_samples=1)
    assert_same(flatten(packed), flatten(alone(dict(enumerate(prompts)), num_samples=1)), 1e-5)
    ((_, group_ids_PT),) = tables
    assert sum(len(set(row) - {-1}) for row in group_ids_PT.tolist()) == len(prompts)
    assert np.sum(group_ids_PT.max(axis=1) >= 0) < len(prompts)
    assert np.sum(group_ids_PT >= 0) == sum(len(prompt) - 1 for prompt in prompts)


@pytest.mark.parametrize(
    ("family", "mesh", "kv_dtype"),
    [
        ("qwen3", (), "int8"),
        ("gemma3_text", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), None),
    ],
)
def test_one_long_prompt_among_short_ones_is_cut_and_changes_nothing(family, mesh, kv_dtype, one_device):
    """Alone, each prompt lies in a row of the table; together, the long one takes eight of them."""
    rng = np.random.default_rng(9)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (20, 250, 9, 30, 17, 25, 12, 28)]
    single, _ = one_device(family)
    setup = with_sampler(build(family, mesh=mesh) if mesh else single, kv_dtype=kv_dtype)
    together = sample(setup, prompts=prompts)
    shapes = [name[1] for name in setup.sampler.engine.programs if name[0] == "generate"]
    assert {(shape.table_length, shape.rows_per_prompt) for shape in shapes} == {(32, 8)}
    some = (1, 3, 7)
    alone = one_at_a_time(single, 250, kv_dtype=kv_dtype)({i: prompts[i] for i in some})
    assert_same(flatten([together[i] for i in some]), flatten(alone), 1e-5)


def test_rows_for_the_longest_prompt_are_prefilled_as_far_as_they_are_filled(qwen, alone, monkeypatch):
    rng = np.random.default_rng(10)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (20, 9, 30, 17)]
    expected = alone(dict(enumerate(prompts)))
    monkeypatch.setattr("rl.sampler.slot_session.MAX_PREFILL_CHUNK", 64)
    setup = with_sampler(qwen)
    setup.sampler.expect([*prompts, [5] * 250])
    pieces, get = [], setup.sampler.engine.programs.get
    setup.sampler.engine.programs.get = lambda key, build: pieces.append(key) or get(key, build)
    assert_same(flatten(sample(setup, prompts=prompts)), flatten(expected), 1e-5)
    starts = [key for key in pieces if key[0] == "prefill"]
    assert len(starts) == 2, "128 positions hold all four prompts, 32 each; the row has 256"


def test_few_prompts_of_a_large_plan_are_prefilled_in_few_rows(qwen):
    setup = with_sampler(qwen, slots=None)
    setup.sampler.expect([[5] * 14] * 16, 16, 1)
    prefills = record_prefills(setup)
    for count in (16, 8, 9, 1):
        sample(setup, prompts=[[3 + i] * 14 for i in range(count)], num_samples=1)
    assert [len(tokens_PT) for tokens_PT, _ in prefills] == [16, 4, 4, 16, 4]


def test_long_prompts_are_prefilled_in_chunks_over_a_growing_cache(qwen, alone, monkeypatch):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (150, 40, 130)]
    expected = alone(dict(enumerate(prompts)))
    monkeypatch.setattr("rl.sampler.slot_session.PREFILL_TOKENS", 32)
    monkeypatch.setattr("rl.sampler.slot_session.MIN_PREFILL_CHUNK", 32)
    setup = with_sampler(qwen)
    assert_same(flatten(sample(setup, prompts=prompts)), flatten(expected), 1e-5)
    chunks = {name[2:4] for name in setup.sampler.engine.programs if name[0] == "prefill"}
    assert chunks == {(32, 32), (32, 64), (32, 128), (32, 192)}, "(positions at a time, positions of the cache)"


def test_rows_differ_by_sample_prompt_index_and_key(qwen, qwen_completions, alone):
    for group in qwen_completions:
        assert len({tuple(c.token_ids.tolist()) for c in group}) == NUM_SAMPLES
    again = alone({0: PROMPTS[0], 9: PROMPTS[0]})
    assert_same(again[0], qwen_completions[0], 1e-5)
    assert again[1][0].token_ids.tolist() != qwen_completions[0][0].token_ids.tolist()
    other_key = qwen.sampler.sample(qwen.params, PROMPTS, NUM_SAMPLES, PLAIN, jax.random.key(8))
    assert other_key[0][0].token_ids.tolist() != qwen_completions[0][0].token_ids.tolist()


def test_requests_have_their_own_limits_and_seeds_and_stream_as_they_end(qwen):
    requests = [
        Request(0, 0, 0, limit=24),
        Request(1, 1, 0, limit=3),
        Request(2, 7, 5, limit=24, seed=11),
        Request(3, 9, 5, limit=10, seed=11),
        Request(2, 8, 5, limit=24, seed=12),
    ]
    sampling = changed(eos_ids=())
    setup = with_sampler(qwen, chunk=4)
    setup.sampler.expect_length(13, 4, 2)

    def stream(prompts, requests, key):
        return setup.sampler.stream(setup.params, prompts, requests, sampling, jax.random.key(key))

    order, done = [], {}
    for number, completion in stream(PROMPTS, requests, 7):
        order.append(number)
        done[number] = completion
    assert order[:2] == [1, 3]
    assert [len(done[i].token_ids) for i in range(5)] == [24, 3, 24, 10, 24]
    # A seed replaces key and prompt index: the same prompt, seed and sample give the same completion elsewhere.
    ((_, again),) = stream([PROMPTS[2]], [Request(0, 3, 5, limit=24, seed=11)], 99)
    assert again.token_ids.tolist() == done[2].token_ids.tolist() != done[4].token_ids.tolist()


def test_a_long_completion_outlives_several_sizes_of_the_cache_which_change_nothing(qwen, monkeypatch):
    sampling = changed(eos_ids=(), max_completion_length=140)

    def drawn(*lengths: int) -> list[list[Completion]]:
        setup = with_sampler(qwen)
        completions = sample(setup, sampling, num_samples=1)
        assert {name[1].length for name in setup.sampler.engine.programs if name[0] == "generate"} == set(lengths)
        return completions

    growing = drawn(64, 128, 144)
    assert all(len(c.token_ids) == 140 and c.finish_reason == "length" for c in flatten(growing))
    assert logprob_differences(qwen, growing, sampling.temperature).max() <= 1e-4
    monkeypatch.setattr("rl.sampler.sizes.MIN_LENGTH", 144)
    assert_same(flatten(drawn(144)), flatten(growing), 1e-5)


def test_dropping_idle_slots_changes_nothing(qwen):
    # So many tokens end a completion that most of the 32 rows finish early and a few go on.
    sampling = changed(eos_ids=(0, 1, 2, 3, 4), max_completion_length=32)
    prompts = [*PROMPTS[:3], [13, *PROMPTS[1] * 11]]  # the last one lies in four rows of the table
    setup = with_sampler(qwen, slots=None, chunk=8)
    dropping = flatten(sample(setup, sampling, prompts=prompts, num_samples=8))
    shapes = [name[1] for name in setup.sampler.engine.programs if name[0] == "generate"]
    assert {(shape.num_slots, shape.rows_per_prompt) for shape in shapes} == {(32, 4), (16, 4), (8, 4)}
    assert 0 < sum(len(c.token_ids) > 20 for c in dropping) < 16
    never_dropping = flatten(sample(with_sampler(qwen, slots=8), sampling, prompts=prompts, num_samples=8))
    assert_same(dropping, never_dropping, 1e-5)


@pytest.mark.parametrize(
    ("family", "pure_nnx", "mesh", "slots"),
    [
        ("qwen3", True, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), 16),
        ("qwen3", False, ("mesh.fsdp=8",), 8),
        pytest.param("qwen3", True, ("mesh.data=2", "mesh.tensor=4"), 4, marks=pytest.mark.long),
        ("qwen2", False, ("mesh.data=4", "mesh.tensor=2"), 16),
        pytest.param("llama", True, ("mesh.data=2", "mesh.fsdp=4"), 16, marks=pytest.mark.long),
        ("gemma3_text", False, ("mesh.fsdp=2", "mesh.tensor=4"), 4),
    ],
)
def test_eight_devices_draw_the_same_completions(family, pure_nnx, mesh, slots, one_device):
    setup = with_sampler(build(family, pure_nnx, mesh=mesh), slots=slots)
    assert_same(flatten(sample(setup)), flatten(one_device(family)[1]), 1e-5)


@pytest.mark.parametrize(
    ("options", "changes", "common_length", "tolerance"),
    [
        ({"kv_dtype": "int8"}, {}, 0, 1e-3),  # a key whose last bit differs may round to the next integer
        (
            {"weights": Quantization("int8", head=True)},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "top_logprobs": 3},
            100,
            1e-5,
        ),
    ],
    ids=["int8_cache", "int8_weights_common_prefix_penalties_and_top_logprobs"],
)
def test_eight_devices_draw_the_same_with_every_option(
    qwen, sharded_qwen, qwen_completions, options, changes, common_length, tolerance
):
    head = np.random.default_rng(3).integers(3, VOCAB, common_length).tolist()
    prompts, sampling = [[*head, *prompt] for prompt in PROMPTS], changed(**changes)
    # Two slots in each of four shards: every slot is handed over.
    one, sharded = (with_sampler(setup, slots=8, **options) for setup in (qwen, sharded_qwen))
    completions = flatten(sample(one, sampling, prompts=prompts))
    assert_same(flatten(sample(sharded, sampling, prompts=prompts)), completions, tolerance)
    # Each option does something.
    shapes = {name[1] for name in sharded.sampler.engine.programs if name[0] == "generate"}
    assert {shape.common_length > 0 for shape in shapes} == {common_length > 0}
    assert (("weights",) in sharded.sampler.engine.programs) == ("weights" in options)
    plain = flatten(qwen_completions)
    differences = [abs(a.policy_logprobs[0] - b.policy_logprobs[0]) for a, b in zip(completions, plain, strict=True)]
    assert max(differences) > 1e-3
    penalised = [abs(c.sampler_logprobs - c.policy_logprobs).max() for c in completions]
    assert (max(penalised) > 1e-3) == bool(changes)
    assert all(c.top_ids.shape[1] == sampling.top_logprobs for c in completions)


def test_sharded_decoding_moves_no_cache_between_devices():
    """Slots and prompts stay on their device: nothing as large as a layer's cache is gathered."""
    setup = with_sampler(build("qwen3", mesh=("mesh.data=8",)), slots=None)
    sample(setup, prompts=[[3 + i, 5, 6] for i in range(8)], num_samples=8)
    programs = {name: setup.sampler.engine.programs.get(name, None) for name in setup.sampler.engine.programs}
    text = max((program.as_text() for name, program in programs.items() if name[0] == "generate"), key=len)
    shape = max((name[1] for name in programs if name[0] == "generate"), key=lambda shape: shape.num_slots)
    config = setup.policy.config
    layer = shape.num_slots * shape.length * config.num_kv_heads * config.head_dim
    gathers = re.findall(r"= \w+\[([\d,]*)\][^=]* all-(?:gather|reduce|to-all)", text)
    assert all(math.prod(int(n) for n in dims.split(",") if n) < layer / 4 for dims in gathers)


# How the cache is kept


def test_more_samples_of_the_same_prompts_store_no_more_of_them(qwen):
    rng = np.random.default_rng(9)
    prompts = [rng.integers(3, VOCAB, 90).tolist() for _ in range(3)]
    peaks = []
    for num_samples in (2, 32):
        setup = with_sampler(qwen, slots=4)
        sample(setup, changed(max_completion_length=4), prompts=prompts, num_samples=num_samples)
        peaks.append(setup.sampler.peak_kv_bytes)
    assert peaks[1] <= peaks[0]
    # Four slots of 16 positions, and each prompt once in a row of 96.
    assert peaks[0] <= (4 * 16 + 3 * 96) * qwen.sampler.engine.bytes_per_position()


def test_decoding_holds_no_second_copy_of_the_weights():
    setup = build(hidden_size=128, intermediate_size=256)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(setup.params))
    requests = [Request(p, p, s, limit=24) for p in range(4) for s in range(4)]
    before = {id(array) for array in jax.live_arrays()}
    held = [
        sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
        for _ in setup.sampler.stream(setup.params, PROMPTS, requests, PLAIN, jax.random.key(0))
    ]
    assert len(held) == 16
    assert setup.sampler.peak_kv_bytes < weights / 2
    assert max(held) < weights


def test_an_int8_cache_is_a_quarter_and_its_log_probs_stay_close(qwen):
    full, small = with_sampler(qwen), with_sampler(qwen, kv_dtype="int8")
    completions = sample(small)
    differences = logprob_differences(small, completions, PLAIN.temperature)
    assert 1e-6 < differences.mean() < 2e-2
    sample(full)
    # int8 vectors of 8 numbers carry a float32 scale and every position three labels: more than a quarter here.
    assert small.sampler.engine.bytes_per_position() == full.sampler.engine.bytes_per_position() - 2 * 2 * (8 * 3 - 4)
    assert small.sampler.peak_kv_bytes < 0.55 * full.sampler.peak_kv_bytes


@pytest.mark.parametrize(
    ("mesh", "weights"),
    [
        ((), Quantization("int8", head=True)),
        pytest.param((), Quantization("float8_e4m3fn"), marks=pytest.mark.long),
        (("mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"), Quantization("int4", 4, head=True)),
    ],
)
def test_quantised_weights_draw_from_the_model_they_are(mesh, weights, qwen):
    setup = build(mesh=mesh) if mesh else qwen
    small = with_sampler(setup, weights=weights)
    completions = sample(small)
    # Rounded weights are another model: its own full forward pass gives the log-probs, the policy's only nearly.
    exact = logprob_differences(setup, completions, PLAIN.temperature)
    assert 1e-5 < exact.mean() < 0.2
    quantize = jax.jit(functools.partial(quantize_params, setup.policy.config, quantization=weights))
    rounded = setup._replace(params=quantize(setup.params))
    assert logprob_differences(rounded, completions, PLAIN.temperature).max() <= 1e-4
    # Those of prompts are, too: here a prompt is taken for the completion of its first token.
    found = small.sampler.prompt_logprobs(setup.params, PROMPTS, PLAIN.temperature, 16)
    for prompt, logprobs in zip(PROMPTS[:3], found[:3], strict=True):
        as_completion = dataclasses.replace(completions[0][0], token_ids=np.asarray(prompt[1:]), sample_index=0)
        (logits_LV,) = full_forward_logits(rounded, prompt[:1], [as_completion])
        expected = logprobs_of(logits_LV / PLAIN.temperature, as_completion.token_ids)
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)
    assert found[3].size == 0


def test_the_number_of_slots_follows_from_the_memory_budget(qwen, qwen_completions):
    per_position = qwen.sampler.engine.bytes_per_position()
    budget = per_position * (5 * 32 + 4 * 16 + 40)
    setup = with_sampler(qwen, slots=None, kv_bytes=budget)
    assert_same(flatten(sample(setup)), flatten(qwen_completions), 1e-5)
    slots = max(name[1].num_slots for name in setup.sampler.engine.programs if name[0] == "generate")
    assert 3 <= slots <= 6
    with pytest.raises(ValueError, match=r"kv_memory must allow at least one completion of 32 tokens, .* got 100"):
        sample(with_sampler(qwen, slots=None, kv_bytes=100))


# How completions end


def test_the_memory_budget_counts_prompts_that_are_prefilled_beside_the_full_caches(qwen):
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in rng.integers(90, 128, 64)]
    per_position = qwen.sampler.engine.bytes_per_position()
    budget = per_position * 24 * (128 + 16)
    setup = with_sampler(qwen, slots=None, kv_bytes=budget)
    sample(setup, changed(max_completion_length=12), prompts=prompts, num_samples=1)
    assert 0.75 * budget < setup.sampler.peak_kv_bytes <= budget


def test_the_memory_budget_counts_few_prompts_that_are_prefilled_beside_the_table_of_a_large_plan():
    setup = build(num_layers=3)
    budget = setup.sampler.engine.bytes_per_position() * 2700  # 16 rows of 128 positions, 16 slots of 16, and a sixth
    setup = with_sampler(setup, slots=None, kv_bytes=budget)
    setup.sampler.expect([[5] * 120] * 16, 16, 1)
    prompts = [[3 + i] * 120 for i in range(2)]
    sample(setup, changed(max_completion_length=2), prompts=prompts, num_samples=1)
    assert setup.sampler.peak_kv_bytes <= budget


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


def test_penalties_bias_and_forbidden_ids_act_on_what_the_slot_has_drawn(qwen):
    rules = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    sampling = changed(**rules, logit_bias=((7, 1.5),), forbidden_ids=(4, 9), top_logprobs=3)
    # Fewer slots than completions: a slot that is handed over forgets what it had counted.
    completions = sample(with_sampler(qwen, slots=3), sampling)
    for prompt, group in zip(PROMPTS, completions, strict=True):
        for completion, logits_LV in zip(group, full_forward_logits(qwen, prompt, group), strict=True):
            scores_LV, counts_V = logits_LV.astype(np.float64), np.zeros(VOCAB)
            seen_V = np.isin(np.arange(VOCAB), prompt)
            for scores_V, token in zip(scores_LV, completion.token_ids, strict=True):
                repeated_V = seen_V | (counts_V > 0)
                penalised_V = np.where(scores_V > 0, scores_V / 1.3, scores_V * 1.3)
                scores_V[:] = np.where(repeated_V, penalised_V, scores_V) - 0.4 * counts_V - 0.2 * (counts_V > 0)
                scores_V[7] += 1.5
                scores_V[[4, 9]] = -np.inf
                counts_V[token] += 1
            expected_L = logprobs_of(scores_LV / sampling.temperature, completion.token_ids)
            np.testing.assert_allclose(completion.sampler_logprobs, expected_L, atol=1e-4)
            top_LN = np.argsort(-logits_LV, axis=1)[:, :3]
            np.testing.assert_array_equal(completion.top_ids, top_LN)
            for n in range(3):
                plain_L = logprobs_of(logits_LV / sampling.temperature, top_LN[:, n])
                np.testing.assert_allclose(completion.top_logprobs[:, n], plain_L, atol=1e-4)
    assert logprob_differences(qwen, completions, sampling.temperature).max() <= 1e-4


# Shapes and input


@contextlib.contextmanager
def counted_compiles() -> Iterator[list[str]]:
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_call_compiles_nothing_and_leaves_the_parameters_alone(qwen):
    sample(qwen)
    num_compiles = len(qwen.sampler.engine.programs)
    with counted_compiles() as compiled:
        first = sample(qwen)
        other_lengths = sample(qwen, prompts=[[3] * 2, [4] * 7, [5] * 16, [6] * 11])
    assert len(flatten(first)) == len(flatten(other_lengths)) == 16
    assert len(qwen.sampler.engine.programs) == num_compiles
    assert not compiled
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(qwen.params))


def test_bfloat16_draws_with_float32_logprobs():
    setup = build("qwen3", dtype="bfloat16", param_dtype="bfloat16")
    completions = sample(setup, changed(max_completion_length=8))
    assert all(c.policy_logprobs.dtype == np.float32 for c in flatten(completions))
    assert all(np.isfinite(c.policy_logprobs).all() for c in flatten(completions))
    assert logprob_differences(setup, completions, PLAIN.temperature).mean() < 0.1


def test_nothing_is_compiled_after_warm_up_whatever_the_lengths(qwen, monkeypatch):
    monkeypatch.setattr("rl.sampler.sizes.MIN_LENGTH", 16)  # grows in 32 tokens
    rng = np.random.default_rng(6)
    dataset = [rng.integers(3, VOCAB, length).tolist() for length in [*range(2, 40), 40]]
    setup = with_sampler(qwen, slots=16, chunk=8)
    setup.sampler.expect(dataset)
    sampling = changed(max_completion_length=32, eos_ids=(1, 2, 3))
    setup.sampler.warm_up(setup.params, 8, 8, sampling)
    setup.sampler.engine.programs.wait()
    keys = [jax.random.key(call) for call in range(4)]
    used, generate = set(), setup.sampler.engine.generate

    def recorded(params: Any, state: Any, *arguments: Any) -> Any:
        used.add((state.shape.num_slots, state.shape.length))
        return generate(params, state, *arguments)

    setup.sampler.engine.generate = recorded
    num_compiles = len(setup.sampler.engine.programs)
    with counted_compiles() as compiled:
        for key in keys:
            prompts = [dataset[i] for i in rng.integers(0, len(dataset), 8)]
            setup.sampler.sample(setup.params, prompts, 8, sampling, key)
    assert (compiled, len(setup.sampler.engine.programs)) == ([], num_compiles)
    slots, lengths = (set(sizes) for sizes in zip(*used, strict=True))
    assert slots == {16, 8}, "slots were dropped"
    assert lengths == {16, 32}, "the cache grew"


@pytest.mark.parametrize("company", [pytest.param("one_device", marks=pytest.mark.long), "eight_devices"])
def test_warm_up_alone_is_enough_for_prompts_and_completions_of_every_length(company, qwen, sharded_qwen):
    lengths, rng = range(1, 9), np.random.default_rng(2)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in lengths]
    setup = with_sampler({"one_device": qwen, "eight_devices": sharded_qwen}[company], slots=None)
    sampling, key = changed(max_completion_length=max(lengths), eos_ids=()), jax.random.key(0)
    setup.sampler.expect(prompts, len(prompts), 3)
    setup.sampler.warm_up(setup.params, len(prompts), 3, sampling)
    setup.sampler.engine.programs.wait()
    # Every prompt with every limit: three samples of all together, whose slots are dropped as they end, and each alone.
    calls = [[Request(p, p, s, limit=1 + (p + shift) % 8) for p in range(8) for s in range(3)] for shift in range(8)]
    calls += [[request] for call in calls for request in call[::3]]
    num_compiles, seen = len(setup.sampler.engine.programs), set()
    with counted_compiles() as compiled:
        for requests in calls:
            for number, completion in setup.sampler.stream(setup.params, prompts, requests, sampling, key):
                request = requests[number]
                assert len(completion.token_ids) == request.limit
                seen.add((len(requests), len(prompts[request.prompt]), request.limit))
    assert seen == {(size, length, limit) for size in (1, 24) for length in lengths for limit in lengths}
    assert (compiled, len(setup.sampler.engine.programs)) == ([], num_compiles)


def test_a_second_run_finds_every_program_in_the_persistent_cache(qwen, tmp_path):
    config = load_config(None, [f"logging.compilation_cache={tmp_path}"])
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    events: list[str] = []

    def listen(event: str, **kwargs: Any) -> None:
        events.append(event.removeprefix("/jax/compilation_cache/"))

    def run() -> tuple[list[list[Completion]], int, int, int]:
        # What a process of its own does not have: jax's caches, and the programs of other samplers.
        jax.clear_caches()
        events.clear()
        setup = with_sampler(qwen._replace(built={}))
        setup.sampler.expect(PROMPTS, len(PROMPTS), NUM_SAMPLES)
        setup.sampler.warm_up(setup.params, len(PROMPTS), NUM_SAMPLES, short)
        setup.sampler.engine.programs.wait()
        completions = sample(setup, short)
        hits, misses = events.count("cache_hits"), events.count("cache_misses")
        return completions, len(setup.sampler.engine.programs), hits, misses

    short = changed(max_completion_length=16)
    jax.monitoring.register_event_listener(listen)
    try:
        use_compilation_cache(config)
        compilation_cache.reset_cache()
        first, num_programs, _, misses = run()
        assert misses >= num_programs > 5
        second, same_number, hits, misses = run()
    finally:
        jax.monitoring.unregister_event_listener(listen)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert (misses, same_number) == (0, num_programs)
    assert hits >= num_programs
    assert_same(flatten(second), flatten(first))


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
    num_compiles = len(qwen.sampler.engine.programs)
    with pytest.raises(ValueError, match=message):
        sample(qwen, changed(**changes), prompts)
    assert len(qwen.sampler.engine.programs) == num_compiles


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 4}, r"requests\[1\]\.prompt must be in \[0, 4\), got 4"),
        ({"prompt": -1}, r"requests\[1\]\.prompt must be in \[0, 4\), got -1"),
        ({"prompt_index": 2**31}, r"requests\[1\]\.prompt_index must be in \[0, 2147483648\), got 2147483648"),
        ({"prompt_index": -1}, r"requests\[1\]\.prompt_index must be in \[0, 2147483648\), got -1"),
        ({"sample_index": 2**31}, r"requests\[1\]\.sample_index must be in \[0, 2147483648\), got 2147483648"),
        ({"seed": -1}, r"requests\[1\]\.seed must be in \[0, 4294967296\), got -1"),
        ({"seed": 2**32}, r"requests\[1\]\.seed must be in \[0, 4294967296\), got 4294967296"),
        ({"limit": 0}, r"requests\[1\]\.limit must be between 1 and sampling\.max_completion_length \(24\), got 0"),
        ({"limit": 25}, r"requests\[1\]\.limit must be between 1 and sampling\.max_completion_length \(24\), got 25"),
        (
            {"limit": 1},
            r"requests\[1\]\.limit must be between sampling\.min_completion_length \(2\) and .* \(24\), got 1",
        ),
    ],
)
def test_requests_that_cannot_be_drawn_are_refused_before_anything_runs(qwen, changes, message):
    requests = [Request(0, 0, 0, limit=24), dataclasses.replace(Request(1, 1, 0, limit=24), **changes)]
    sampling = changed(min_completion_length=2 if changes.get("limit") == 1 else 0)
    num_compiles = len(qwen.sampler.engine.programs)
    with pytest.raises(ValueError, match=message):
        qwen.sampler.stream(qwen.params, PROMPTS, requests, sampling, jax.random.key(0))
    assert len(qwen.sampler.engine.programs) == num_compiles


def test_bad_arguments_are_refused(qwen, sharded_qwen):
    with pytest.raises(ValueError, match="num_samples must be >= 1"):
        sample(qwen, num_samples=0)
    with pytest.raises(ValueError, match="prompt_indices must have one entry for each of 4 prompts, got 1"):
        sample(qwen, prompt_indices=[1])
    with pytest.raises(ValueError, match="slots must be >= 4"):
        with_sampler(sharded_qwen, slots=3)
    assert sample(qwen, prompts=[]) == []
    with pytest.raises(ValueError, match="stop_strings needs a tokenizer"):
        sample(with_sampler(qwen, decode_text=None), changed(stop_strings=("a",)))
