"""Layers with a state in the sampler: its log-probs are those of the training pass, however prompts come to slots."""

import contextlib
import dataclasses
import string
from functools import partial

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.config import logical_axes
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.sampler import slot_sampler, slot_session
from rl.sampler.contract import Request
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

PIECE = 40  # positions of a piece of prefill at most, so that there are two


def make(overrides=()):
    """(A maker of samplers, their parameters, an assertion that completions behind tokens have the log-probs that the
    training pass has of whole sequences).
    """
    settings = load_config(None, overrides)
    mesh = create_mesh(settings.mesh, jax.devices() if overrides else jax.devices()[:1])
    config = tiny_config("qwen3_5_text", dtype="float64", param_dtype="float64")
    policy, params = create_policy(config, pure_nnx=not overrides), noisy_params(config)
    shardings = tree_shardings(params, logical_axes(config), mesh, settings.mesh.rules)
    params = jax.device_put(params, shardings)
    forward = jax.jit(lambda p, t: jax.nn.log_softmax(policy.unembed(p, policy.hidden(p, plain_inputs(t)))))

    def assert_drawn(drawn):
        tokens = np.zeros((32, 160), np.int32)
        for row, (before, completion) in zip(tokens, drawn, strict=False):
            ids = [*before, *completion.token_ids]
            row[: len(ids)] = ids
        for (before, completion), logprobs_TV in zip(drawn, np.asarray(forward(params, tokens)), strict=False):
            places = len(before) - 1 + np.arange(len(completion.token_ids))
            want = logprobs_TV[places, completion.token_ids]
            np.testing.assert_allclose(completion.policy_logprobs, want, rtol=0, atol=1e-10)

    return partial(Sampler, policy, mesh, shardings, rules=settings.mesh.rules), params, assert_drawn


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ((), ["alike"]),
        pytest.param((), ["short", "equal"], marks=pytest.mark.long),
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
        make_sampler, params, assert_drawn = make(overrides)
        how = SamplingParams(max_completion_length=24, eos_ids=(3, 4))
        for prompts in ({"short": short, "alike": alike, "equal": [head[:73]] * 3}[kind] for kind in kinds):
            with contextlib.closing(make_sampler(slots=8)) as sampler:
                groups = sampler.sample(params, prompts, 4, how, jax.random.key(1))
            drawn = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
            assert_drawn(drawn)
            assert len({len(completion.token_ids) for _, completion in drawn}) > 1, "slots are handed over"


def test_turns_go_on_from_kept_states_and_from_their_prompts_where_there_is_no_way_back(monkeypatch):
    """Of few kept rows, behind stop strings, behind fewer tokens than were drawn, and behind none."""
    plan, keep, written = slot_sampler.turn_shape, slot_sampler.Engine.keep, []

    def with_few_rows(*args):
        return dataclasses.replace(plan(*args), num_kept=3, num_active=2)

    def noted(engine, state, slots, rows):
        written.append([row for row in rows[0].tolist() if row < 3])
        return keep(engine, state, slots, rows)

    monkeypatch.setattr(slot_sampler, "turn_shape", with_few_rows)
    monkeypatch.setattr(slot_sampler.Engine, "keep", noted)
    letters = dict(enumerate(string.ascii_lowercase[:11] * 9, start=5))
    rng = np.random.default_rng(2)
    prompts = [rng.integers(5, VOCAB, length).tolist() for length in (9, 1, 2, 3)]  # shorter than the convolution, too
    how = SamplingParams(max_completion_length=8, eos_ids=(3,), stop_strings=("b", "cc"))
    with jax.enable_x64(True):
        make_sampler, params, assert_drawn = make()
        sampler = make_sampler(slots=4, decode_text=lambda ids: "".join(letters.get(int(i), "") for i in ids))
        sampler.expect_length(12, 4, 2)
        session = sampler.open(params, how, jax.random.key(7), 4, 2, 60)
        numbers = session.submit(prompts, [Request(p, p, g, 8) for p in range(4) for g in range(2)])
        tokens, turns, drawn = {number: [] for number in numbers}, dict.fromkeys(numbers, 0), []
        while session.num_left:
            for number, completion in session.poll():
                prompt, turns[number] = prompts[numbers.index(number) // 2], turns[number] + 1
                drawn.append(([*prompt, *tokens[number]], completion))
                tokens[number] += completion.token_ids.tolist()
                more = rng.integers(5, VOCAB, number % 3 * 4).tolist()
                if turns[number] == 4:
                    session.finish(number)
                elif turns[number] == 1 or number % 4 == 3:
                    tokens[number] += more
                    session.go_on(number, more, len(tokens[number]) + 8)
                else:
                    num_kept = 0 if number == numbers[2] else len(tokens[number]) - 1
                    more, before = more if num_kept else [], session.num_read_again
                    tokens[number] = [*tokens[number][:num_kept], *more]
                    session.follow(number, num_kept, more, Request(0, 0, 0, 8, seed=number))
                    assert session.num_read_again == before + num_kept
        assert len(drawn) == 4 * len(numbers)
        assert {completion.finish_reason for _, completion in drawn} == {"eos", "stop", "length"}
        assert_drawn(drawn)
    assert all(len({*rows}) == len(rows) for rows in written), "no row is written twice at a time, in any order"
