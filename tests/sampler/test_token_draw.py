"""One token drawn from logits: against plain numpy and transformers, and at the edges of the uniform number."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models.logprobs import token_logprobs
from rl.sampler.token_draw import SamplingParams, TokenCounts, add_token, adjust, draw, reset_rows, truncate

PLAIN = SamplingParams(max_completion_length=8)
# What came before the drawn token: tokens of both signs, one in both, some often.
PROMPT = [3, 11, 11, 20, 21, 22, 23]
COMPLETION = [7, 7, 7, 20, 45, 30, 31, 32, 7]


def params(**changes) -> SamplingParams:
    return dataclasses.replace(PLAIN, **changes)


def logits_of(num_rows: int, vocab_size: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((num_rows, vocab_size))).astype(dtype)


def reference_distribution(logits_V: np.ndarray, sampling: SamplingParams, forbid_eos: bool) -> np.ndarray:
    """Probabilities by sorting, one rule after the other, in float64, after PROMPT and COMPLETION."""
    scores = logits_V.astype(np.float64)
    for token in set(PROMPT + COMPLETION):
        factor = sampling.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in COMPLETION:
        scores[token] -= sampling.frequency_penalty
    for token in set(COMPLETION):
        scores[token] -= sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    if forbid_eos:
        scores[list(sampling.eos_ids)] = -np.inf
    scores[list(sampling.forbidden_ids)] = -np.inf
    scores = scores / sampling.temperature
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


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def counts_of(prompts, completions, vocab_size: int) -> TokenCounts:
    return TokenCounts(
        completion_BV=jnp.asarray([np.bincount(tokens, minlength=vocab_size) for tokens in completions], jnp.int32),
        prompt_BV=jnp.asarray([np.isin(np.arange(vocab_size), tokens) for tokens in prompts]),
    )


def draw_once(logits_BV, uniform_B, sampling: SamplingParams, forbid_eos: bool = False, counts=None):
    uniform_B = jnp.asarray(uniform_B, jnp.asarray(logits_BV).dtype)
    forbid_B = jnp.full(uniform_B.shape, forbid_eos)
    return jax.jit(draw, static_argnums=2)(jnp.asarray(logits_BV), uniform_B, sampling, forbid_B, counts)


RULES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 7},
    "top_k_of_everything": {"top_k": 5000},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "all_truncations": {"temperature": 1.3, "top_k": 40, "top_p": 0.85, "min_p": 0.02},
    "min_completion_length": {"eos_ids": (3, 5), "min_completion_length": 2},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_reward": {"repetition_penalty": 0.6},
    "frequency_penalty": {"frequency_penalty": 0.9},
    "presence_penalty": {"presence_penalty": 1.5},
    "logit_bias": {"logit_bias": ((40, 12.0), (3, -2.5), (299, 9.0))},
    "forbidden_ids": {"forbidden_ids": (3, 4, 45)},
    "everything": {
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.85,
        "min_p": 0.02,
        "eos_ids": (3, 5),
        "min_completion_length": 2,
        "repetition_penalty": 1.3,
        "frequency_penalty": -0.4,
        "presence_penalty": 0.7,
        "logit_bias": ((3, 5.0), (7, 2.5), (299, 9.0)),
        "forbidden_ids": (4, 45),
        "top_logprobs": 3,
    },
}


@pytest.mark.parametrize("rule", RULES)
def test_evenly_spread_uniforms_reproduce_the_reference_distribution(rule):
    sampling, num_draws = params(**RULES[rule]), 4096
    logits_V = logits_of(1, 300)[0]
    logits_V[3] = logits_V.max() + 1  # an EOS that would come often
    forbid_eos = bool(sampling.min_completion_length)
    expected_V = reference_distribution(logits_V, sampling, forbid_eos)
    uniform_B = (np.arange(num_draws) + 0.5) / num_draws
    before = counts_of([PROMPT] * num_draws, [COMPLETION] * num_draws, 300) if sampling.needs_counts else None
    drawn = draw_once(np.tile(logits_V, (num_draws, 1)), uniform_B, sampling, forbid_eos, before)

    counts_V = np.bincount(drawn.token_B, minlength=300)
    # An interval of the CDF holds as many evenly spread points as its length says, give or take one at its two ends.
    assert np.max(np.abs(counts_V - num_draws * expected_V)) <= 1.1
    assert np.all(counts_V[expected_V == 0] == 0)
    np.testing.assert_allclose(drawn.sampler_logprob_B, np.log(expected_V[drawn.token_B]), atol=2e-5)
    policy_V = log_softmax(logits_V / sampling.temperature)
    np.testing.assert_allclose(drawn.policy_logprob_B, policy_V[drawn.token_B], atol=2e-5)


class Identity:
    """A policy whose hidden states are its logits."""

    def unembed(self, params, hidden):
        return hidden + params


# Of a vocabulary of 300: 10 words of bits, 8 of end ids; the others are as many ids.
KEPT_WORDS = {
    "top_k": 7,
    "top_p": 10,
    "min_p": 10,
    "min_completion_length": 8,
    "bias_and_forbidden": 0,
    "few_ids_of_all_rules": 9,
}
TOGETHER = RULES["logit_bias"] | RULES["min_completion_length"]
SEVERAL = {
    "few_ids_of_all_rules": RULES["all_truncations"] | TOGETHER | {"top_k": 9},
    "bias_and_forbidden": RULES["forbidden_ids"] | RULES["logit_bias"],
}


@pytest.mark.parametrize("rule", KEPT_WORDS)
def test_log_probs_over_the_kept_ids_are_those_drawn_from(rule):
    """Of the policy that drew, and, with entropy and gradient, of another one against the same ids in plain numpy."""
    sampling = params(**(RULES | SEVERAL)[rule], reports_kept=True)
    rows, vocab_size, rng = 6, 300, np.random.default_rng(6)
    logits_BV = logits_of(rows, vocab_size, seed=4, dtype=np.float64)
    logits_BV[:, 3] += 6  # an EOS that would come often
    other_BV = logits_BV + rng.standard_normal((rows, vocab_size))
    weights_2B, uniform_B = rng.standard_normal((2, rows)), rng.random(rows)
    forbid_eos = bool(sampling.min_completion_length)

    @jax.jit
    def drawn_and_trained(logits_BV, other_BV):
        drawn = draw(logits_BV, jnp.asarray(uniform_B), sampling, jnp.full(rows, forbid_eos))

        def weighted(hidden_BV):
            words_BTX = None if drawn.kept_words_BX is None else jnp.tile(drawn.kept_words_BX[None], (2, 1, 1))
            values = token_logprobs(
                Identity(),
                jnp.zeros(vocab_size),
                jnp.stack([logits_BV, hidden_BV]),
                jnp.tile(drawn.token_B[None], (2, 1)),
                sampling.temperature,
                4,
                with_entropy=True,
                drawn_from=sampling.drawn_from,
                kept_words_BTX=words_BTX,
            )
            return sum(jnp.sum(w * x[1]) for w, x in zip(weights_2B, values, strict=True)), values

        return drawn, jax.value_and_grad(weighted, has_aux=True)(other_BV)

    with jax.enable_x64(True):
        drawn, ((_, values), gradient_BV) = jax.device_get(drawn_and_trained(logits_BV, other_BV))
    assert (0 if drawn.kept_words_BX is None else drawn.kept_words_BX.shape[1]) == KEPT_WORDS[rule]
    np.testing.assert_allclose(values[0][0], drawn.sampler_logprob_B, rtol=0, atol=1e-12)
    expected_BV = np.array([reference_distribution(row, sampling, forbid_eos) for row in logits_BV])
    kept_BV = expected_BV > 0
    for place, scores_BV in enumerate((logits_BV, other_BV)):
        biased_BV = scores_BV.copy()
        for token, bias in sampling.logit_bias:
            biased_BV[:, token] += bias
        p_BV = np.where(kept_BV, np.exp(log_softmax(np.where(kept_BV, biased_BV, -1e9) / sampling.temperature)), 0)
        log_p_BV = np.log(np.where(kept_BV, p_BV, 1))
        np.testing.assert_allclose(values[0][place], log_p_BV[np.arange(rows), drawn.token_B], rtol=0, atol=1e-12)
        np.testing.assert_allclose(values[1][place], -np.sum(p_BV * log_p_BV, axis=1), rtol=0, atol=1e-12)
    # d log p / d logit_v = [v is the token] - p_v; d entropy / d logit_v = -p_v (log p_v + entropy)
    is_token_BV = np.arange(vocab_size) == drawn.token_B[:, None]
    of_entropy_BV = -p_BV * (log_p_BV + values[1][1][:, None])
    expected_BV = weights_2B[0][:, None] * (is_token_BV - p_BV) + weights_2B[1][:, None] * of_entropy_BV
    np.testing.assert_allclose(gradient_BV, expected_BV / sampling.temperature, rtol=0, atol=1e-12)


def test_of_ids_that_tie_with_the_last_one_of_top_k_the_lowest_are_kept_where_kept_ids_are_reported():
    logits_BV = np.zeros((2, 300), np.float32)
    logits_BV[1, [40, 41]] = 1
    sampling = params(top_k=4, reports_kept=True, min_completion_length=1, eos_ids=tuple(range(290, 300)))
    drawn = draw_once(np.repeat(logits_BV, 64, axis=0), np.tile((np.arange(64) + 0.5) / 64, 2), sampling)
    words_BX = np.asarray(drawn.kept_words_BX)
    assert np.unique(drawn.token_B[:64]).tolist() == sorted(words_BX[0] - 1) == [0, 1, 2, 3]
    assert np.unique(drawn.token_B[64:]).tolist() == sorted(words_BX[64] - 1) == [0, 1, 40, 41]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty must be 1.0 with grpo.policy_distribution=sampled"),
        ({"presence_penalty": -0.2}, "presence_penalty must be 0.0 with grpo.policy_distribution=sampled"),
        ({"frequency_penalty": 0.2}, "frequency_penalty must be 0.0 with grpo.policy_distribution=sampled"),
        ({"temperature": 0.0}, "temperature must be > 0 with grpo.policy_distribution=sampled"),
        ({"min_completion_length": 1, "eos_ids": tuple(range(9))}, "eos_ids must be at most 8 ids with"),
    ],
)
def test_rules_whose_distribution_cannot_be_computed_again_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        params(**changes, reports_kept=True)


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


@pytest.mark.parametrize("vocab_size", [1, 97, 128, 259])
@pytest.mark.parametrize("rules", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_logits_that_are_not_finite_draw_tokens_of_the_vocabulary_with_log_probs_that_say_so(vocab_size, rules):
    logits_BV = logits_of(5, vocab_size)
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        logits_BV[row] = value
    logits_BV[3, -1], logits_BV[4, 0] = np.nan, np.inf
    drawn = draw_once(logits_BV, np.linspace(0, 0.99, 5), params(**rules))
    assert np.all((drawn.token_B >= 0) & (drawn.token_B < vocab_size))
    assert not np.any(np.isfinite(drawn.policy_logprob_B))


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


def test_penalties_and_bias_computed_by_hand():
    logits_BV = jnp.asarray([[2.0, -1.0, 0.5, 0.0]] * 3)
    sampling = params(
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        logit_bias=((3, 1.0),),
        forbidden_ids=(2,),
    )
    before = counts_of([[0]] * 3, [[1, 1]] * 3, 4)
    # 2 / 2 = 1, -1 * 2 - 2 * 0.25 - 0.5 = -3, (forbidden), 0 + 1 = 1
    np.testing.assert_array_equal(adjust(logits_BV, sampling, before), [[1.0, -3.0, 0.5, 1.0]] * 3)
    total = 2 * math.e + math.exp(-3)
    drawn = draw_once(logits_BV, [0.0, (math.e + math.exp(-3) / 2) / total, 0.999], sampling, counts=before)
    np.testing.assert_array_equal(drawn.token_B, [0, 1, 3])
    np.testing.assert_allclose(drawn.sampler_logprob_B, np.array([1, -3, 1]) - math.log(total), rtol=1e-6)
    raw_total = math.exp(2) + math.exp(-1) + math.exp(0.5) + 1
    np.testing.assert_allclose(drawn.policy_logprob_B, np.array([2, -1, 0]) - math.log(raw_total), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rules_agree_with_the_logits_processors_of_transformers(temperature):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    num_rows, vocab_size, rng = 60, 200, np.random.default_rng(4)
    logits_BV = logits_of(num_rows, vocab_size, dtype=np.float64)
    prompts = [rng.integers(0, vocab_size, rng.integers(1, 40)) for _ in range(num_rows)]
    completions = [rng.integers(0, vocab_size, rng.integers(0, 40)) for _ in range(num_rows)]
    eos_ids, bias, forbidden = (3, 9), ((5, 4.0), (17, -3.0)), (6, 80)
    sampling = params(
        temperature=temperature,
        repetition_penalty=1.4,
        logit_bias=bias,
        forbidden_ids=forbidden,
        eos_ids=eos_ids,
        min_completion_length=4,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
    )
    processors = [
        logits_process.RepetitionPenaltyLogitsProcessor(1.4),
        logits_process.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias]),
        logits_process.SuppressTokensLogitsProcessor(list(eos_ids + forbidden)),
        logits_process.TemperatureLogitsWarper(temperature),
        logits_process.TopKLogitsWarper(50),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.MinPLogitsWarper(0.01),
    ]
    expected_BV = np.zeros_like(logits_BV)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids, scores = torch.tensor([[*prompt, *completion]]), torch.tensor(logits_BV[row : row + 1])
        for processor in processors:
            scores = processor(ids, scores)
        expected_BV[row] = torch.log_softmax(scores, -1)[0].numpy()
    with jax.enable_x64(True):
        before = counts_of(prompts, completions, vocab_size)
        drawn = draw_once(logits_BV, rng.random(num_rows), sampling, True, before)
    rows = np.arange(num_rows)
    np.testing.assert_allclose(drawn.sampler_logprob_B, expected_BV[rows, drawn.token_B], rtol=0, atol=1e-12)
    expected_policy_BV = log_softmax(logits_BV / temperature)
    np.testing.assert_allclose(drawn.policy_logprob_B, expected_policy_BV[rows, drawn.token_B], rtol=0, atol=1e-12)


def test_frequency_and_presence_penalty_do_not_see_the_prompt():
    logits_BV = jnp.asarray(logits_of(1, 300))
    sampling = params(frequency_penalty=1.0, presence_penalty=1.0)
    before = counts_of([PROMPT], [[]], 300)
    np.testing.assert_array_equal(adjust(logits_BV, sampling, before), logits_BV)


def test_greedy_takes_the_argmax_of_penalised_logits_at_every_step_of_a_loop():
    logits_BV = jnp.asarray([[3.0, 2.75, 2.5, -9.0], [3.0, 2.75, 2.5, -9.0]])

    def tokens_of(num_steps: int, **changes) -> list[list[int]]:
        sampling = params(temperature=0.0, **changes)
        before = counts_of([[3], [0]], [[], []], 4)
        tokens = []
        for _ in range(num_steps):
            drawn = draw_once(logits_BV, np.zeros(2), sampling, counts=before)
            before = add_token(before, drawn.token_B, jnp.array([True, True]))
            tokens.append(drawn.token_B.tolist())
        return np.transpose(tokens).tolist()

    assert tokens_of(4, presence_penalty=1.0) == [[0, 1, 2, 0]] * 2
    # With 0.5 lost per occurrence: (3, 2.75, 2.5), (2.5, 2.75, 2.5), (2.5, 2.25, 2.5), (2, 2.25, 2.5), (2, 2.25, 2) ...
    assert tokens_of(5, frequency_penalty=0.5) == [[0, 1, 0, 2, 1]] * 2
    # The second row's prompt holds token 0, which starts at 3 / 2.
    assert tokens_of(4, repetition_penalty=2.0) == [[0, 1, 2, 0], [1, 2, 0, 0]]
    assert tokens_of(2, forbidden_ids=(0,), logit_bias=((2, 1.0),)) == [[2, 2]] * 2


def test_greedy_draw_with_every_rule_is_certain_and_has_the_policy_at_temperature_one():
    logits_BV = logits_of(4, 300)
    sampling = params(**RULES["everything"] | {"temperature": 0.0})
    before = counts_of([PROMPT] * 4, [COMPLETION] * 4, 300)
    drawn = draw_once(logits_BV, np.full(4, np.nan), sampling, True, before)
    at_one = dataclasses.replace(sampling, temperature=1.0)
    expected_B = [reference_distribution(row, at_one, True).argmax() for row in logits_BV]
    np.testing.assert_array_equal(drawn.token_B, expected_B)
    assert np.any(drawn.token_B != logits_BV.argmax(-1))
    np.testing.assert_array_equal(drawn.sampler_logprob_B, 0)
    policy_BV = log_softmax(logits_BV)
    np.testing.assert_allclose(drawn.policy_logprob_B, policy_BV[np.arange(4), expected_B], atol=1e-5)
    np.testing.assert_allclose(drawn.top_logprobs_BN, np.sort(policy_BV, -1)[:, :-4:-1], atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rules", [{}, {"top_k": 2, "logit_bias": ((7, 20.0),), "forbidden_ids": (1,)}])
def test_top_logprobs_are_the_largest_of_the_plain_softmax_whatever_the_rules(temperature, rules):
    logits_BV = logits_of(20, 300)
    sampling = params(temperature=temperature, top_logprobs=5, **rules)
    drawn = draw_once(logits_BV, np.random.default_rng(3).random(20), sampling)
    expected_BV = log_softmax(logits_BV / (temperature or 1.0))
    expected_ids_BN = np.argsort(-expected_BV, kind="stable")[:, :5]
    assert drawn.top_ids_BN.dtype == np.int32
    np.testing.assert_array_equal(drawn.top_ids_BN, expected_ids_BN)
    np.testing.assert_allclose(drawn.top_logprobs_BN, np.take_along_axis(expected_BV, expected_ids_BN, -1), atol=2e-5)
    same_BN = np.asarray(drawn.top_ids_BN) == np.asarray(drawn.token_B)[:, None]
    rows = np.nonzero(same_BN)[0]
    np.testing.assert_array_equal(np.asarray(drawn.top_logprobs_BN)[same_BN], np.asarray(drawn.policy_logprob_B)[rows])


def test_no_top_logprobs_are_empty_arrays_of_the_same_types():
    for dtype, x64 in ((np.float32, False), (np.float64, True)):
        with jax.enable_x64(x64):
            drawn = draw_once(logits_of(3, 50, dtype=dtype), np.zeros(3), PLAIN)
        assert drawn.top_ids_BN.shape == drawn.top_logprobs_BN.shape == (3, 0)
        assert (drawn.top_ids_BN.dtype, drawn.top_logprobs_BN.dtype) == (np.int32, dtype)


def test_log_probs_have_the_precision_of_the_logits():
    sampling = params(**RULES["everything"])
    logits_BV = logits_of(8, 300, dtype=np.float64)
    with jax.enable_x64(True):
        before = counts_of([PROMPT] * 8, [COMPLETION] * 8, 300)
        drawn = draw_once(logits_BV, np.random.default_rng(5).random(8), sampling, True, before)
        single = draw_once(logits_BV.astype(np.float32), np.zeros(8), sampling, True, before)
    assert drawn.kept_words_BX is None
    for wide, narrow in zip(jax.tree.leaves(drawn), jax.tree.leaves(single), strict=True):
        assert (wide.dtype, narrow.dtype) in ((np.int32, np.int32), (np.float64, np.float32))
    expected_BV = np.array([reference_distribution(row, sampling, True) for row in logits_BV])
    expected_B = np.log(expected_BV[np.arange(8), drawn.token_B])
    np.testing.assert_allclose(drawn.sampler_logprob_B, expected_B, rtol=0, atol=1e-12)


def test_tokens_are_counted_in_live_rows_and_rows_start_anew():
    rng, num_rows, vocab_size = np.random.default_rng(6), 5, 9
    counts = counts_of([[0]] * num_rows, [[]] * num_rows, vocab_size)
    expected = [collections.Counter() for _ in range(num_rows)]
    for _ in range(30):
        token_B, live_B = rng.integers(0, vocab_size, num_rows), rng.random(num_rows) < 0.7
        counts = jax.jit(add_token)(counts, jnp.asarray(token_B, jnp.int32), jnp.asarray(live_B))
        for row in np.flatnonzero(live_B):
            expected[row][int(token_B[row])] += 1
    expected_BV = np.array([[counter[token] for token in range(vocab_size)] for counter in expected])
    np.testing.assert_array_equal(counts.completion_BV, expected_BV)
    assert counts.completion_BV.dtype == np.int32

    new_prompts_BV = jnp.asarray(rng.random((num_rows, vocab_size)) < 0.5)
    fresh = jax.jit(reset_rows)(counts, jnp.array([False, True, False, False, True]), new_prompts_BV)
    np.testing.assert_array_equal(fresh.completion_BV[jnp.array([1, 4])], 0)
    np.testing.assert_array_equal(fresh.prompt_BV[jnp.array([1, 4])], new_prompts_BV[jnp.array([1, 4])])
    for kept in (0, 2, 3):
        np.testing.assert_array_equal(fresh.completion_BV[kept], expected_BV[kept])
        np.testing.assert_array_equal(fresh.prompt_BV[kept], np.arange(vocab_size) == 0)
    assert (fresh.completion_BV.dtype, fresh.prompt_BV.dtype) == (np.int32, np.bool_)


def equations(jaxpr):
    """Every primitive operation, those inside loops and nested functions too."""
    for equation in jaxpr.eqns:
        parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr"))
        inner = [getattr(x, "jaxpr", x) for x in parameters if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        if inner:
            for jaxpr_inside in inner:
                yield from equations(jaxpr_inside)
        else:
            yield equation


# Operations in all, and those whose result is as large as the logits, before penalties, bias and the like existed.
@pytest.mark.parametrize(
    ("rules", "num_operations", "num_large"),
    [
        ({}, 73, 6),
        ({"temperature": 0.0}, 24, 2),
        ({"top_k": 7}, 93, 11),
        ({"top_p": 0.6}, 122, 21),
        ({"min_p": 0.2}, 95, 11),
        ({"eos_ids": (3, 5), "min_completion_length": 2}, 98, 11),
    ],
)
def test_rules_that_are_off_add_no_operation(rules, num_operations, num_large):
    num_rows, vocab_size = 4, 300
    logits_BV, uniform_B = jnp.zeros((num_rows, vocab_size)), jnp.zeros(num_rows)

    def counted(sampling: SamplingParams) -> tuple[int, int]:
        traced = jax.make_jaxpr(lambda *arrays: draw(*arrays[:2], sampling, arrays[2]))
        found = list(equations(traced(logits_BV, uniform_B, uniform_B > 0).jaxpr))
        large = [eqn for eqn in found if any(out.aval.size >= logits_BV.size for out in eqn.outvars)]
        return len(found), len(large)

    operations, large = counted(params(**rules))
    assert operations <= num_operations
    assert large <= num_large
    more_operations, _ = counted(params(**rules, forbidden_ids=(1,)))
    assert more_operations > operations  # so that the count sees what is there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forbidden_ids": tuple(range(6))}, "forbidden_ids must be fewer, .* than the 6 tokens .* got 6"),
        ({"forbidden_ids": (0, 1, 2, 3), "eos_ids": (4, 5), "min_completion_length": 1}, "forbidden_ids must be fewer"),
        ({"forbidden_ids": (1, 6)}, r"forbidden_ids must be on token ids below .* \(6\), got \[6\]"),
        ({"logit_bias": ((7, 1.0), (2, 1.0))}, r"logit_bias must be on token ids below .* \(6\), got \[7\]"),
        ({"top_logprobs": 7}, r"top_logprobs must be <= .* \(6\), got 7"),
        ({"presence_penalty": 1.0}, "must be given counts"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_that_do_not_fit_the_vocabulary_are_refused_at_trace_time(changes, message, temperature):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x: draw(x, x[:, 0], params(temperature=temperature, **changes), x[:, 0] > 0), jnp.zeros((2, 6))
        )


def test_one_token_that_is_left_is_drawn_for_certain():
    sampling = params(forbidden_ids=(0, 1, 2, 3), eos_ids=(4,), min_completion_length=1)
    drawn = draw_once(logits_of(8, 6), np.linspace(0, 1, 8), sampling, forbid_eos=True)
    np.testing.assert_array_equal(drawn.token_B, 5)
    np.testing.assert_allclose(drawn.sampler_logprob_B, 0, atol=1e-6)


def test_the_largest_bias_keeps_every_number_finite():
    sampling = params(logit_bias=((2, 1e30), (3, -1e30)), temperature=0.1, top_p=0.9)
    drawn = draw_once(logits_of(8, 6), np.linspace(0, 1, 8), sampling)
    np.testing.assert_array_equal(drawn.token_B, 2)
    np.testing.assert_array_equal(drawn.sampler_logprob_B, 0)
    assert np.all(np.isfinite(drawn.policy_logprob_B))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-40}, r"temperature must be 0 \(greedy\) or >= 1e-06, .*, got 1e-40"),
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
