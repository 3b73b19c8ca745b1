"""Log-probs of what was drawn from, in the loss: ratio, gradient and KL where sampling is truncated."""

import jax
import jax.numpy as jnp
import numpy as np

from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_metrics import finish_metrics
from rl.algorithms.loss_types import LossInputs
from rl.algorithms.losses import denominators_for, grpo_loss
from rl.config.load import load_config
from rl.models.logprobs import token_logprobs
from rl.sampler.token_draw import SamplingParams, draw

B, T, V = 6, 82, 64
SAMPLING = SamplingParams(max_completion_length=T, top_p=0.8, reports_kept=True)


class LogitsAsParams:
    """A policy whose parameters are the logits at each position, whose hidden states are places."""

    def unembed(self, params, hidden):
        return params[hidden[..., 0].astype(jnp.int32)]


def test_weights_of_truncated_sequences_vanish_under_the_whole_softmax_and_are_1_over_the_kept_ids():
    modes = ["grpo.sampler_is_correction=true", "grpo.sampler_is_mode=sequence_truncate", "grpo.loss_type=dapo"]
    loss_settings = loss_config(load_config(None, modes))
    rng = np.random.default_rng(2)
    logits_NV = jnp.asarray(rng.standard_normal((B * T, V)), jnp.float32)
    places_BT1 = jnp.arange(B * T, dtype=jnp.float32).reshape(B, T, 1)
    advantages_B = jnp.asarray(rng.choice([-1.0, 1.0], B), jnp.float32)

    @jax.jit
    def measured(uniform_N):
        drawn = draw(logits_NV, uniform_N, SAMPLING, jnp.zeros(B * T, bool))

        def loss(logits_NV, is_sampled):
            values = token_logprobs(
                LogitsAsParams(),
                logits_NV,
                places_BT1,
                drawn.token_B.reshape(B, T),
                1.0,
                None,
                with_entropy=True,
                drawn_from=SAMPLING.drawn_from if is_sampled else None,
                kept_words_BTX=drawn.kept_words_BX.reshape(B, T, -1) if is_sampled else None,
            )
            inputs = LossInputs(
                old_logprobs_BT=jax.lax.stop_gradient(values[0]),
                reference_logprobs_BT=jax.lax.stop_gradient(values[0]),
                sampler_logprobs_BT=drawn.sampler_logprob_B.reshape(B, T),
                mask_BT=jnp.ones((B, T)),
                advantages_B=advantages_B,
                sequence_mask_B=jnp.ones(B),
            )
            counts = denominators_for(inputs.mask_BT, inputs.sequence_mask_B, None, loss_settings, entropy_coef=0.0)
            return grpo_loss(*values, inputs, counts, loss_settings)

        results = []
        for is_sampled in (False, True):
            (_, sums), gradient_NV = jax.value_and_grad(loss, has_aux=True)(logits_NV, is_sampled)
            results.append((finish_metrics(sums), gradient_NV))
        return drawn, results

    drawn, ((full, full_gradient_NV), (sampled, gradient_NV)) = jax.device_get(measured(rng.random(B * T, np.float32)))
    # Each token of the whole softmax holds the probability that top-p left, about 0.82: 82 of them leave 1e-7.
    assert full["sampler_ratio/raw_mean"] < 1e-6
    assert np.linalg.norm(full_gradient_NV) < 1e-6
    assert abs(sampled["sampler_ratio/raw_mean"] - 1) < 1e-5
    assert abs(sampled["ratio/mean"] - 1) < 1e-5
    assert sampled["kl"] == 0
    # On-policy with weights of 1 it is REINFORCE: A (p - [v is the token]) / tokens over the kept ids.
    kept_NV = np.asarray(SAMPLING.drawn_from.kept(drawn.kept_words_BX, V))
    p_NV = np.where(kept_NV, np.exp(logits_NV), 0).astype(np.float64)
    p_NV /= p_NV.sum(axis=1, keepdims=True)
    is_token_NV = np.arange(V) == drawn.token_B[:, None]
    expected_NV = np.repeat(advantages_B, T)[:, None] * (p_NV - is_token_NV) / (B * T)
    np.testing.assert_allclose(gradient_NV, expected_NV, rtol=0, atol=1e-8)
    assert np.linalg.norm(gradient_NV) > 0.03
    np.testing.assert_allclose(sampled["entropy"], -np.mean(np.sum(p_NV * np.log(np.where(kept_NV, p_NV, 1)), axis=1)))
