"""SmolLM2-135M-Instruct against transformers: runs where the environment variable TANDEM_SMOLLM2 names its folder."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models import cache as kv
from rl.models.files import hf
from rl.models.flavours import create_policy
from rl.models.inputs import Inputs, plain_inputs
from tests.helpers.places import FILES
from tests.helpers.tiny_models import init_cache

ROWS = json.loads((FILES / "smollm2_135m_instruct.json").read_text())["rows"]
FOLDER = os.environ.get("TANDEM_SMOLLM2", "")

pytestmark = pytest.mark.skipif(not FOLDER, reason="TANDEM_SMOLLM2 names no folder with SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def model():
    config = hf.read_config(FOLDER)
    return config, hf.load_params(FOLDER, config)


def padded_rows():
    """All rows in one batch [B, T] with their labels."""
    length = max(len(row["prompt_ids"]) + len(row["greedy_ids"]) for row in ROWS)
    tokens = np.zeros((len(ROWS), length), np.int32)
    groups = np.full_like(tokens, -1)
    for i, row in enumerate(ROWS):
        ids = row["prompt_ids"] + row["greedy_ids"]
        tokens[i, : len(ids)], groups[i, : len(ids)] = ids, 0
    return plain_inputs(tokens)._replace(group_ids_BT=groups)


@pytest.mark.parametrize("flavour", [False, True])
def test_logprobs_are_those_of_transformers(model, flavour):
    config, params = model
    policy, batch = create_policy(config, flavour), padded_rows()

    @jax.jit
    def logprobs_of(params):
        logprobs = jax.nn.log_softmax(policy.unembed(params, policy.hidden(params, batch)[:, :-1]))
        return jnp.take_along_axis(logprobs, batch[0][:, 1:, None], axis=-1)[..., 0]

    logprobs = logprobs_of(params)
    for row, expected in zip(logprobs, (row["next_token_logprobs"] for row in ROWS), strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("flavour", [False, True])
def test_greedy_answers_through_the_cache_are_those_of_transformers(model, flavour):
    config, params = model
    policy = create_policy(config, flavour)
    lengths_B = np.array([len(row["prompt_ids"]) for row in ROWS])
    num_new = max(len(row["greedy_ids"]) for row in ROWS)
    inputs = Inputs(*(x[:, : lengths_B.max()] for x in padded_rows()))
    inputs = inputs._replace(group_ids_BT=np.where(inputs.positions_BT < lengths_B[:, None], 0, -1))

    @jax.jit
    def continue_greedily(params):
        cache = init_cache(config, *inputs.tokens_BT.shape)
        hidden, cache = policy.extend(params, inputs, cache)
        last = jnp.take_along_axis(hidden, (lengths_B - 1)[:, None, None], axis=1)
        cache = init_cache(config, len(lengths_B), num_new, [kv.share_evenly(cache.own, len(lengths_B))])

        def step(carry, count):
            last, cache = carry
            token = jnp.argmax(policy.unembed(params, last), axis=-1).astype(jnp.int32)
            zeros = jnp.zeros_like(token)
            positions = lengths_B[:, None] + count
            return policy.extend(params, Inputs(token, positions, zeros, zeros + 1), cache), token[:, 0]

        return jax.lax.scan(step, (last, cache), jnp.arange(num_new))[1].T

    drawn_BT = continue_greedily(params)
    for drawn, row in zip(drawn_BT, ROWS, strict=True):
        assert drawn[: len(row["greedy_ids"])].tolist() == row["greedy_ids"]
