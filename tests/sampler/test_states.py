"""Layers with a state in the sampler: its log-probs are those of the training pass, however prompts come to slots."""

import contextlib

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.config import logical_axes
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.sampler import slot_sampler, slot_session
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

PIECE = 16  # positions of a piece of prefill, so that there are several


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ((), ["alike"]),
        pytest.param((), ["short"], marks=pytest.mark.long),
        pytest.param(("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), ["alike", "short"], marks=pytest.mark.long),
    ],
)
def test_states_of_prompts_and_of_a_common_prefix_reach_the_slots(overrides, kinds, monkeypatch):
    """More requests than slots; prompts shorter than the convolution, of several pieces, and nothing but the prefix."""
    for module in (slot_sampler, slot_session):
        monkeypatch.setattr(module, "prefill_chunk", lambda _: PIECE)
    rng = np.random.default_rng(0)
    short = [rng.integers(5, VOCAB, length).tolist() for length in (1, 2, 3, 40, 33)]
    head = rng.integers(5, VOCAB, 75).tolist()
    alike = [head + short[0], head + short[4], head[:73]]
    with jax.enable_x64(True):
        settings = load_config(None, overrides)
        mesh = create_mesh(settings.mesh, jax.devices() if overrides else jax.devices()[:1])
        config = tiny_config("qwen3_5_text", dtype="float64", param_dtype="float64")
        policy = create_policy(config, pure_nnx=not overrides)
        params = noisy_params(config)
        shardings = tree_shardings(params, logical_axes(config), mesh, settings.mesh.rules)
        params = jax.device_put(params, shardings)
        how = SamplingParams(max_completion_length=24, eos_ids=(3, 4))
        forward = jax.jit(lambda p, t: jax.nn.log_softmax(policy.unembed(p, policy.hidden(p, plain_inputs(t)))))
        for prompts in ({"short": short, "alike": alike}[kind] for kind in kinds):
            with contextlib.closing(Sampler(policy, mesh, shardings, rules=settings.mesh.rules, slots=8)) as sampler:
                groups = sampler.sample(params, prompts, 4, how, jax.random.key(1))
            tokens = np.zeros((24, 160), np.int32)
            drawn = [(len(p), p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
            for row, (_, prompt, completion) in enumerate(drawn):
                ids = [*prompt, *completion.token_ids]
                tokens[row, : len(ids)] = ids
            logprobs = np.asarray(forward(params, tokens))
            for row, (start, _, completion) in enumerate(drawn):
                places = start - 1 + np.arange(len(completion.token_ids))
                want = logprobs[row, places, completion.token_ids]
                np.testing.assert_allclose(completion.policy_logprobs, want, rtol=0, atol=1e-10)
            assert len({len(completion.token_ids) for _, _, completion in drawn}) > 1, "slots are handed over"
