"""Aligned waves draw what the toolkit's own sampler draws, whatever the waves are; limits of memory and shape."""

import dataclasses

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, no_implicit_transfers, tree_shardings
from rl.models.config import logical_axes
from rl.models.flavours import NNXPolicy
from rl.run.metrics import CompileCounter
from rl.sampler.contract import Request, requests_for
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from rl.sampler.wave_sampler import WaveSampler
from tests.helpers.tiny_models import init_cache, noisy_params, tiny_config

RULES = load_config(None).mesh.rules
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5], [12, 13, 14], [20, 21, 22, 23, 24], [5, 6, 7, 8, 9, 10, 11, 12, 13]]
SAMPLING = SamplingParams(max_completion_length=12, eos_ids=(3, 4), temperature=0.9)


class AlignedDecoder(NNXPolicy):
    """The own decoder in the terms of a policy with a cache of its own."""

    decodes_in_waves = True

    def empty_cache(self, params, num_rows, length):
        return init_cache(self.config, num_rows, length)


def setup(num_devices=1):
    mesh = create_mesh(load_config(None, [f"mesh.num_devices={num_devices}"]).mesh)
    config = tiny_config("qwen3", num_layers=1)
    params = noisy_params(config)
    shardings = tree_shardings(params, logical_axes(config), mesh, RULES)
    return config, mesh, jax.device_put(params, shardings), shardings


def text_of(token_ids):
    return "".join(chr(97 + int(token) % 26) for token in token_ids)


def drawn(sampler, params, sampling, requests, prompts=PROMPTS, seed=0):
    key = jax.random.key(seed)
    with no_implicit_transfers():
        return dict(sampler.stream(params, prompts, requests, sampling, key))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for number, completion in left.items():
        other = right[number]
        assert completion.token_ids.tolist() == other.token_ids.tolist()
        ends = (completion.finish_reason, completion.stop_reason, completion.prompt_index, completion.sample_index)
        assert ends == (other.finish_reason, other.stop_reason, other.prompt_index, other.sample_index)
        np.testing.assert_allclose(completion.sampler_logprobs, other.sampler_logprobs, atol=1e-4)
        np.testing.assert_allclose(completion.policy_logprobs, other.policy_logprobs, atol=1e-4)
        np.testing.assert_array_equal(completion.top_ids, other.top_ids)
        assert (completion.kept_words is None) == (other.kept_words is None)
        if completion.kept_words is not None:
            assert completion.kept_words.shape == (len(completion.token_ids), 8)
            np.testing.assert_array_equal(completion.kept_words, other.kept_words)
            # The ends are forbidden at the first tokens only, wherever chunks and slots begin.
            forbidden = [row[row > 0].tolist() for row in completion.kept_words]
            ends = [token + 1 for token in SAMPLING.eos_ids]
            assert forbidden == ([ends] * 3 + [[]] * len(forbidden))[: len(forbidden)]


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        dataclasses.replace(SAMPLING, repetition_penalty=1.3, frequency_penalty=0.2, top_k=20, top_logprobs=2),
        dataclasses.replace(SAMPLING, stop_strings=("ab", "q"), min_completion_length=3, reports_kept=True),
    ],
    ids=["plain", "penalties", "stops"],
)
def test_waves_draw_what_the_own_sampler_draws(sampling):
    config, mesh, params, shardings = setup()
    options = {"rules": RULES, "decode_text": text_of}
    requests = [*requests_for(range(len(PROMPTS)), 3, 12), Request(1, 1, 7, 5, seed=11)]
    own = Sampler(NNXPolicy(config), mesh, shardings, slots=8, **options)
    # Four rows at a time: waves of ragged prompts, the last one not full.
    waves = WaveSampler(AlignedDecoder(config), mesh, shardings, slots=4, chunk=5, **options)
    waves.expect_length(20)  # with what is continued
    expected = drawn(own, params, sampling, requests)
    assert len({completion.finish_reason for completion in expected.values()}) > 1
    assert_same(drawn(waves, params, sampling, requests), expected)

    # Cut after its first token or before its last one, and continued, each is what it was in one go.
    cuts = {i: min(1 if i % 2 else 99, len(whole.token_ids) - 1) for i, whole in expected.items()}
    continued = [
        dataclasses.replace(request, continues=tuple(expected[i].token_ids[: cuts[i]].tolist()))
        for i, request in enumerate(requests)
    ]
    begun = {(request.prompt, request.continues) for request in continued if request.continues}
    lengths = [len(PROMPTS[prompt]) + len(tokens) - 1 for prompt, tokens in begun]
    for sampler, num_again in ((own, sum(lengths)), (waves, None)):
        rest = drawn(sampler, params, sampling, continued)
        for i, whole in expected.items():
            assert rest[i].token_ids.tolist() == whole.token_ids[cuts[i] :].tolist()
            assert (rest[i].finish_reason, rest[i].stop_reason) == (whole.finish_reason, whole.stop_reason)
            for name in ("sampler_logprobs", "policy_logprobs", "top_logprobs"):
                there = getattr(whole, name)[cuts[i] :]
                np.testing.assert_allclose(getattr(rest[i], name), there, rtol=1e-6, atol=1e-6)
        assert sampler.num_prefilled_again >= sum(lengths)
        assert num_again is None or sampler.num_prefilled_again == num_again
    for tokens, message in (
        ((5,) * 12, r"requests\[0\]\.continues must have fewer tokens than its limit \(12\), got 12"),
        ((5, 9999), r"requests\[0\]\.continues must have token ids in \[0, \d+\), got 5 to 9999"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(own, params, sampling, [dataclasses.replace(requests[0], continues=tokens)])


def test_waves_do_not_depend_on_rows_or_devices():
    results = []
    for num_devices, slots in ((1, None), (2, 8)):
        config, mesh, params, shardings = setup(num_devices)
        sampler = WaveSampler(AlignedDecoder(config), mesh, shardings, rules=RULES, slots=slots)
        sampler.expect(PROMPTS)
        sampler.warm_up(params, len(PROMPTS), 2, SAMPLING)
        results.append(drawn(sampler, params, SAMPLING, requests_for(range(len(PROMPTS)), 2, 12)))
    assert_same(*results)


def test_smaller_calls_than_the_planned_ones_compile_nothing():
    config, mesh, params, shardings = setup()
    sampler = WaveSampler(AlignedDecoder(config), mesh, shardings, rules=RULES)
    sampler.expect(PROMPTS, len(PROMPTS), 2)
    requests = requests_for(range(len(PROMPTS)), 2, 12)
    expected = drawn(sampler, params, SAMPLING, requests)
    with CompileCounter() as compiles:
        assert_same(drawn(sampler, params, SAMPLING, requests[:3]), {i: expected[i] for i in range(3)})
        assert compiles.count == 0


def test_memory_bounds_the_rows_of_a_wave_and_too_little_is_refused():
    config, mesh, params, shardings = setup()
    policy = AlignedDecoder(config)
    # 9 + 12 tokens, rounded up to 24; keys and values of a layer, 2 heads of 8 floats, and three labels.
    cache = jax.eval_shape(lambda: policy.empty_cache(None, 1, 24))
    per_row = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    requests = requests_for(range(len(PROMPTS)), 2, 12)
    tight = WaveSampler(policy, mesh, shardings, rules=RULES, kv_bytes=3 * per_row)
    free = WaveSampler(policy, mesh, shardings, rules=RULES)
    assert_same(drawn(tight, params, SAMPLING, requests), drawn(free, params, SAMPLING, requests))
    too_small = WaveSampler(policy, mesh, shardings, rules=RULES, kv_bytes=per_row - 1)
    with pytest.raises(ValueError, match=r"sampling.kv_memory must allow at least one sequence of 24 tokens"):
        drawn(too_small, params, SAMPLING, requests)
    with pytest.raises(ValueError, match=r"sampling.stop_strings needs a tokenizer"):
        drawn(free, params, dataclasses.replace(SAMPLING, stop_strings=("a",)), requests)
