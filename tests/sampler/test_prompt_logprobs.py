"""Log-probs of prompts: packed, in several calls and over devices, against a plain forward pass of each alone."""

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.config import ModelConfig, logical_axes
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.run.metrics import CompileCounter
from rl.sampler import prompt_logprobs as module

VOCAB = 40


@pytest.mark.matrix
@pytest.mark.parametrize("mesh", [["mesh.num_devices=1"], ["mesh.data=4", "mesh.fsdp=2"]])
@pytest.mark.parametrize("pure_nnx", [True, False])
def test_packed_prompts_have_the_log_probs_of_each_alone_from_one_program(mesh, pure_nnx, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_CALL", 64)
    config = load_config(None, mesh)
    device_mesh = create_mesh(config.mesh)
    arch = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    policy = create_policy(ModelConfig.from_arch("qwen3", vocab_size=VOCAB, initializer_range=0.5, **arch), pure_nnx)
    params = jax.jit(policy.init)(jax.random.key(1))
    shardings = tree_shardings(params, logical_axes(policy.config), device_mesh, config.mesh.rules)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (1, 17, 3, 40, 2, 9, 30, 5, 22, 1, 40, 6)]

    @jax.jit
    def forward(params, tokens_BT):
        return policy.unembed(params, policy.hidden(params, plain_inputs(tokens_BT)))

    expected = []
    # Each alone in its row: what comes after it is not seen.
    rows_BT = np.array([prompt + [0] * (40 - len(prompt)) for prompt in prompts], np.int32)
    for prompt, logits_TV in zip(prompts, np.asarray(forward(params, rows_BT)), strict=True):
        scores = logits_TV[: len(prompt)].astype(np.float64) / 0.7
        log_total = np.log(np.exp(scores).sum(axis=-1))
        expected.append(scores[np.arange(len(prompt) - 1), prompt[1:]] - log_total[:-1])

    placed = jax.device_put(params, shardings)
    scorer = module.PromptScorer(policy, device_mesh, shardings, config.mesh.rules)
    with CompileCounter() as compiles:
        got = scorer.logprobs(placed, prompts, temperature=0.7, chunk_size=7)
        assert compiles.count == 1
        again = scorer.logprobs(placed, prompts[::-1], temperature=0.7, chunk_size=7)
        assert compiles.count == 1, "other prompts of these sizes"
    np.testing.assert_allclose(np.concatenate(again[::-1]), np.concatenate(expected), atol=1e-5)
    scores = scorer.scores(placed, prompts, 0.7, 7, num_top=3)
    np.testing.assert_allclose(np.concatenate([own for own, _, _ in scores]), np.concatenate(expected), atol=1e-5)
    num_best = 0
    for prompt, (own, ids, best) in zip(prompts, scores, strict=True):
        assert np.all(np.diff(best, axis=1) <= 0)
        is_best = ids[:, 0] == prompt[1:]
        np.testing.assert_array_equal(own[is_best], best[is_best, 0])
        assert np.all(own[~is_best] < best[~is_best, 0])
        num_best += int(is_best.sum())
    assert num_best
    assert [len(values) for values in got] == [len(prompt) - 1 for prompt in prompts]
    assert all(values.dtype == np.float32 for values in got)
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(expected), atol=1e-5)


def test_rows_hold_every_prompt_once_within_their_length_and_nearly_in_order():
    lengths = np.random.default_rng(0).integers(1, 50, 300).tolist()
    rows = module.pack_rows(lengths, 64, 4)
    assert sorted(number for row in rows for number in row) == list(range(300))
    assert all(sum(lengths[number] for number in row) <= 64 and len(row) <= 4 for row in rows)
    assert len(rows) < 1.2 * sum(lengths) / 64 + 1
    firsts = [row[0] for row in rows]
    assert firsts == sorted(firsts), "a row is opened by the next prompt that fits nowhere"
    assert module.pack_rows([64, 64], 64, 4) == [[0], [1]]
    assert module.pack_rows([0, 0, 0, 0, 0], 16, 4) == [[0, 1, 2, 3], [4]]
