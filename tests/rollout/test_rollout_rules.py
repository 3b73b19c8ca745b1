"""Rollouts with shardings of their own (`mesh.rollout_rules`) draw what they draw without, from weights copied over."""

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.devices.mesh import create_mesh, no_implicit_transfers
from rl.models.flavours import policy_from_config
from rl.sampler.contract import DECODE, requests_for
from rl.sampler.create import create_sampler
from rl.sampler.token_draw import SamplingParams
from rl.state.states import InitStateFn, get_abstract_state
from rl.tools.programs.compile import compile_one
from rl.tools.programs.loop_programs import loop_programs
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

SAMPLING = SamplingParams(max_completion_length=6, eos_ids=(0,))
COMPILED = [
    *("model.arch.hidden_size=64", "model.arch.intermediate_size=128", "model.arch.num_layers=1"),
    *("model.arch.num_heads=2", "model.arch.num_kv_heads=2", "model.arch.head_dim=32", "model.arch.vocab_size=259"),
    *("data.max_prompt_length=8", "sampling.max_completion_length=32", "grpo.prompts_per_step=8", "grpo.group_size=2"),
]
PROMPTS = [[1, 5, 9], [7, 3], [11, 2, 8, 4], [20, 21]]


def sample(flavour, *overrides, key=None):
    """(completions, the shardings that weights have while decoding) on four devices."""
    config = load_config(
        None, [f"pure_nnx={flavour == 'nnx'}".lower(), "mesh.num_devices=4", "mesh.tensor=2", *overrides]
    )
    mesh, policy = create_mesh(config.mesh), policy_from_config(config, tiny_config(num_layers=1))
    shardings = get_abstract_state(config, mesh, InitStateFn(policy, None, 0)).shardings.params
    params = jax.device_put(noisy_params(policy.config), shardings)
    sampler = create_sampler(config, policy, mesh, shardings, load_tokenizer("byte", None))
    key = jax.random.key(3) if key is None else key  # on one device, as evaluation makes it
    with no_implicit_transfers():
        groups = sampler.sample(params, PROMPTS, 4, SAMPLING, key)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings  # the policy's own stay where they are
    return [completion for group in groups for completion in group], sampler.engine._param_shardings


@pytest.fixture(scope="module")
def plain():
    return sample("nnx")[0]


@pytest.mark.parametrize(
    ("flavour", "overrides"),
    [
        ("nnx", ("mesh.rollout_rules={embed: [], batch: [data]}",)),
        ("linen", ("mesh.rollout_rules={embed: [], mlp: [tensor, fsdp]}",)),
    ],
)
def test_rollouts_with_rules_of_their_own_draw_the_same(flavour, overrides, plain):
    drawn, shardings = sample(flavour, *overrides)
    up = shardings["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert up.spec[0] is None
    assert any(len(completion.token_ids) > 2 for completion in plain)
    for left, right in zip(plain, drawn, strict=True):
        assert left.token_ids.tolist() == right.token_ids.tolist()
        np.testing.assert_allclose(left.policy_logprobs, right.policy_logprobs, atol=1e-5)


def test_quantised_rollouts_lie_by_their_rules_too(plain):
    drawn, shardings = sample("nnx", "mesh.rollout_rules={embed: []}", "sampling.weight_dtype=int8")
    assert shardings["layers_0"]["mlp"]["up_proj"]["kernel"].values.spec[0] is None
    assert all(max(completion.token_ids) < VOCAB for completion in drawn)
    differences = [np.abs(a.policy_logprobs[0] - b.policy_logprobs[0]) for a, b in zip(plain, drawn, strict=True)]
    assert 0 < np.mean(differences) < 1


def test_the_copy_of_the_weights_is_gone_when_a_rollout_has_ended():
    config = load_config(None, ["mesh.num_devices=4", "mesh.rollout_rules={embed: []}"])
    mesh, policy = create_mesh(config.mesh), policy_from_config(config, tiny_config(num_layers=1))
    shardings = get_abstract_state(config, mesh, InitStateFn(policy, None, 0)).shardings.params
    params = jax.device_put(noisy_params(policy.config), shardings)
    sampler = create_sampler(config, policy, mesh, shardings, load_tokenizer("byte", None))

    def arrays():
        return sum(array.shape == (16, 24) for array in jax.live_arrays())  # matrices that embed cuts, and their copies

    before, during = arrays(), []
    requests = requests_for(range(len(PROMPTS)), 1, SAMPLING.max_completion_length)
    for _ in sampler.stream(params, PROMPTS, requests, SAMPLING, jax.random.key(3)):
        during.append(arrays())
    assert before >= 2
    assert max(during) == before + 2  # gate_proj and up_proj
    assert arrays() == before


def test_decoding_by_rules_of_its_own_sends_nothing_around_for_each_token():
    """What makes it faster: under fsdp devices exchange parts of every product, or of every matrix, once per token."""
    received = []
    for overrides in ((), ("mesh.rollout_rules={embed: []}",)):
        loop = loop_programs(load_config(None, [*COMPILED, *overrides]), jax.devices())
        decode = next(program for program in loop.programs if program.name == DECODE and program.is_reported)
        work = compile_one(decode)[0].work
        received.append(sum(collective.num_bytes for collective in work.collectives.values()))
    assert 100 * received[1] < received[0]


def test_rules_of_rollouts_are_checked_as_the_others():
    with pytest.raises(ValueError, match=r"mesh\.rollout_rules\.embd must name a logical axis of the model"):
        loop_programs(load_config(None, [*COMPILED, "mesh.rollout_rules={embd: []}"]), jax.devices())
    with pytest.raises(ValueError, match=r"mesh\.rollout_rules\.embed must name mesh axes out of .*, got 'fsdpp'"):
        create_mesh(load_config(None, ["mesh.rollout_rules={embed: [fsdpp]}"]).mesh)
