"""One token drawn from logits: against plain numpy, and at the edges of the uniform number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.sampling import SamplingParams, draw, truncate

PLAIN = SamplingParams(max_completion_length=8)


def params(**changes) -> SamplingParams:
    return dataclasses.replace(PLAIN, **changes)


def logits_of(num_rows: int, vocab_size: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((num_rows, vocab_size))).astype(dtype)


def reference_distribution(logits_V: np.ndarray, sampling: SamplingParams, forbid_eos: bool) -> np.ndarray:
    """Probabilities by sorting, one rule after the other, in float64."""
    scores = logits_V.astype(np.float64) / sampling.temperature
    if forbid_eos:
        scores[list(sampling.eos_ids)] = -np.inf
    order = np.argsort(-scores, kind="stable")
    probs = np.exp(scores - scores.max())
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
    if sampling.top_p < 1:
        mass_before = np.cumsum(probs[order]) - probs[order]
        probs[order[mass_before >= sampling.top_p]] = 0
        probs /= probs.sum()
    probs[probs < sampling.min_p * probs.max()] = 0
    return probs / probs.sum()


def draw_once(logits_BV, uniform_B, sampling: SamplingParams, forbid_eos: bool = False):
    uniform_B = jnp.asarray(uniform_B, jnp.asarray(logits_BV).dtype)
    forbid_B = jnp.full(uniform_B.shape, forbid_eos)
    return jax.jit(draw, static_argnums=2)(jnp.asarray(logits_BV), uniform_B, sampling, forbid_B)


RULES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 7},
    "top_k_of_everything": {"top_k": 5000},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.85, "min_p": 0.02},
    "all_without_eos": {"temperature": 1.3, "top_k": 40, "top_p": 0.85, "eos_ids": (3, 5), "min_completion_length": 2},
}


@pytest.mark.parametrize("rule", RULES)
def test_evenly_spread_uniforms_reproduce_the_reference_distribution(rule):
    sampling, num_draws = params(**RULES[rule]), 4096
    logits_V = logits_of(1, 300)[0]
    logits_V[3] = logits_V.max() + 1  # an EOS that would come often
    forbid_eos = bool(sampling.min_completion_length)
    expected_V = reference_distribution(logits_V, sampling, forbid_eos)
    uniform_B = (np.arange(num_draws) + 0.5) / num_draws
    drawn = draw_once(np.tile(logits_V, (num_draws, 1)), uniform_B, sampling, forbid_eos)

    counts_V = np.bincount(drawn.token_B, minlength=300)
    # An interval of the CDF holds as many evenly spread points as its length says, give or take one at its two ends.
    assert np.max(np.abs(counts_V - num_draws * expected_V)) <= 1.1
    assert np.all(counts_V[expected_V == 0] == 0)
    np.testing.assert_allclose(drawn.sampler_logprob_B, np.log(expected_V[drawn.token_B]), atol=2e-5)
    scaled_V = logits_V.astype(np.float64) / sampling.temperature
    policy_V = scaled_V - scaled_V.max() - np.log(np.sum(np.exp(scaled_V - scaled_V.max())))
    np.testing.assert_allclose(drawn.policy_logprob_B, policy_V[drawn.token_B], atol=2e-5)


@pytest.mark.parametrize("vocab_size", [1, 16, 127, 128, 129, 1000])
def test_float64_draw_is_the_plain_inverse_cdf_for_any_vocabulary_size(vocab_size):
    num_rows = 64
    logits_BV = logits_of(num_rows, vocab_size, seed=vocab_size, dtype=np.float64)
    uniform_B = np.random.default_rng(1).random(num_rows)
    with jax.enable_x64(True):
        drawn = draw_once(logits_BV, uniform_B, PLAIN)
    assert drawn.policy_logprob_B.dtype == np.float64
    probs_BV = np.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    probs_BV /= probs_BV.sum(-1, keepdims=True)
    expected_B = [np.searchsorted(np.cumsum(p), u, side="right") for p, u in zip(probs_BV, uniform_B, strict=True)]
    np.testing.assert_array_equal(drawn.token_B, expected_B)
    expected_logprob_B = np.log(probs_BV[np.arange(num_rows), expected_B])
    np.testing.assert_allclose(drawn.policy_logprob_B, expected_logprob_B, atol=1e-13)
    np.testing.assert_array_equal(drawn.policy_logprob_B, drawn.sampler_logprob_B)


def test_nucleus_agrees_with_sorting_on_many_rows_in_both_precisions():
    for dtype, x64 in ((np.float32, False), (np.float64, True)):
        logits_BV = logits_of(200, 50, dtype=dtype)
        sampling = params(top_p=0.7)
        with jax.enable_x64(x64):
            kept_BV = np.isfinite(truncate(jnp.asarray(logits_BV), sampling))
        expected_BV = np.array([reference_distribution(row, sampling, False) > 0 for row in logits_BV])
        np.testing.assert_array_equal(kept_BV, expected_BV)


def test_tokens_that_tie_with_the_last_one_kept_stay():
    logits_BV = np.log(np.array([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    for sampling in (params(top_k=2), params(top_p=0.5), params(min_p=0.5)):
        kept_BV = np.isfinite(truncate(jnp.asarray(logits_BV), sampling))
        np.testing.assert_array_equal(kept_BV, [[True, True, True, False, False]])


def test_the_most_likely_token_survives_every_rule():
    logits_BV = logits_of(50, 300)
    strictest = params(top_k=1, top_p=1e-6, min_p=0.999)
    drawn = draw_once(logits_BV, np.random.default_rng(0).random(50), strictest)
    np.testing.assert_array_equal(drawn.token_B, logits_BV.argmax(-1))
    np.testing.assert_allclose(drawn.sampler_logprob_B, 0, atol=1e-6)
    assert np.all(np.asarray(drawn.policy_logprob_B) < -0.01)


@pytest.mark.parametrize("uniform", [0.0, 1e-30, 0.5, 1 - 2**-24, np.nextafter(np.float32(1), np.float32(0)), 1.0])
def test_a_token_of_probability_zero_never_comes(uniform):
    num_rows, vocab_size = 40, 700
    logits_BV = logits_of(num_rows, vocab_size)
    alive_BV = np.random.default_rng(2).random((num_rows, vocab_size)) < 0.02
    alive_BV[np.arange(num_rows), np.arange(num_rows) * 17] = True
    logits_BV[~alive_BV] = -1e4  # exp underflows to 0, at both ends of the vocabulary too
    drawn = draw_once(logits_BV, np.full(num_rows, uniform, np.float32), PLAIN)
    assert np.all(alive_BV[np.arange(num_rows), drawn.token_B])
    assert np.all(np.isfinite(drawn.sampler_logprob_B))


def test_greedy_takes_the_argmax_as_certain_with_the_policy_at_temperature_one():
    logits_BV = logits_of(30, 300)
    drawn = draw_once(logits_BV, np.full(30, np.nan), params(temperature=0.0))
    best_B = logits_BV.argmax(-1)
    np.testing.assert_array_equal(drawn.token_B, best_B)
    np.testing.assert_array_equal(drawn.sampler_logprob_B, 0)
    expected_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    np.testing.assert_allclose(drawn.policy_logprob_B, expected_BV[np.arange(30), best_B], atol=1e-5)


def test_eos_is_forbidden_only_in_the_rows_that_say_so():
    logits_BV = logits_of(2, 50)
    logits_BV[:, [4, 9]] = 30.0
    sampling = params(temperature=0.0, eos_ids=(4, 9), min_completion_length=1)
    drawn = draw(jnp.asarray(logits_BV), jnp.zeros(2), sampling, jnp.array([True, False]))
    others = np.delete(np.arange(50), [4, 9])
    assert drawn.token_B[0] == others[logits_BV[0, others].argmax()]
    assert drawn.token_B[1] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"min_completion_length": 9}, r"min_completion_length must be between 0 and max_completion_length \(8\)"),
        ({"stop_strings": ("a", "")}, "stop_strings"),
        ({"stop_strings": ["a"]}, "stop_strings must be a tuple"),
        ({"eos_ids": (-1,)}, "eos_ids"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and > 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be finite"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"logit_bias": {3: 1.0}}, "logit_bias must be a tuple"),
        ({"logit_bias": ([3, 1.0],)}, "logit_bias must be a tuple"),
        ({"logit_bias": ((-3, 1.0),)}, "logit_bias must be on token ids >= 0"),
        ({"logit_bias": ((3, float("-inf")),)}, "logit_bias must be finite.*forbidden_ids"),
        ({"logit_bias": ((3, float("nan")),)}, "logit_bias must be finite"),
        ({"logit_bias": ((3, 1.0), (4, 1.0), (3, 2.0))}, "logit_bias must be one bias per token id"),
        ({"forbidden_ids": [1]}, "forbidden_ids must be a tuple"),
        ({"forbidden_ids": (-1,)}, "forbidden_ids must be token ids >= 0"),
        ({"top_logprobs": -1}, "top_logprobs must be >= 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        params(**changes)


def test_defaults_are_neutral_and_parameters_are_hashable():
    everything = params(repetition_penalty=1.2, frequency_penalty=0.5, logit_bias=((3, -2.0),), forbidden_ids=(1,))
    assert not PLAIN.needs_counts
    assert not PLAIN.greedy
    assert hash(everything) == hash(dataclasses.replace(everything))
    assert everything != PLAIN
    for name, value in (("repetition_penalty", 0.9), ("frequency_penalty", -0.5), ("presence_penalty", 0.1)):
        assert params(**{name: value}).needs_counts
    assert not params(logit_bias=((3, -2.0),), forbidden_ids=(1,), top_k=3, top_logprobs=4).needs_counts
