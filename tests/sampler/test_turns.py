"""Completions of several turns: a session draws what the same completions would be in single calls."""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.devices.programs import Programs
from rl.models.config import logical_axes
from rl.models.flavours import create_policy
from rl.run.metrics import CompileCounter
from rl.sampler import slot_sampler
from rl.sampler.contract import Completion, Request
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

NUM_PROMPTS, NUM_SAMPLES, NUM_TURNS, TURN = 3, 4, 3, 6
LONGEST = 120
EOS = (3, 4)
LETTERS = dict(enumerate(string.ascii_lowercase[:11] * 9, start=5))


def decode_text(token_ids: Sequence[int]) -> str:
    return "".join(LETTERS.get(int(token), "") for token in token_ids)


class Turn:
    """The tokens before a turn, and the turn."""

    def __init__(self, before: tuple[int, ...], completion: Completion) -> None:
        self.before, self.completion = before, completion


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(max_completion_length=LONGEST, **{"eos_ids": EOS, "temperature": 1.0, **changes})


def observation(request: Request, turn: int) -> list[int]:
    """What follows a turn: of another length for each, up to more than one piece."""
    rng = np.random.default_rng([request.prompt_index, request.sample_index, turn])
    return rng.integers(5, VOCAB, [2, 40, 1, 9][(request.sample_index + turn) % 4]).tolist()


def play(
    sampler: Sampler,
    params: Any,
    prompts: Sequence[Any],
    how: SamplingParams,
    delay: int = 0,
    num_samples: int = NUM_SAMPLES,
    num_short: int = 0,
):
    """All turns of all requests, [request][turn]; an observation comes after `delay` polls. Also the session.

    num_short: samples of each prompt that have one turn only.
    """
    key = jax.random.key(7)
    session = sampler.open(params, how, key, len(prompts), num_samples, LONGEST)
    requests = [Request(p, p, g, TURN) for p in range(len(prompts)) for g in range(num_samples)]
    numbers = session.submit(prompts, requests)
    turns: list[list[Turn]] = [[] for _ in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    outside: list[tuple[int, int]] = []
    for poll in range(10_000):
        for number, completion in session.poll():
            place = numbers.index(number)
            turns[place].append(Turn(tuple(tokens[place]), completion))
            tokens[place].extend(completion.token_ids.tolist())
            if len(turns[place]) == NUM_TURNS or place % num_samples < num_short:
                session.finish(number)
            else:
                outside.append((poll + delay * (1 + place % 3), place))
        for due, place in list(outside):
            if due <= poll:
                outside.remove((due, place))
                more = observation(requests[place], len(turns[place]))
                tokens[place].extend(more)
                session.go_on(numbers[place], more, len(tokens[place]) + TURN)
        if not session.num_left:
            return turns, session
    raise AssertionError("the session does not end")


def in_single_calls(sampler: Sampler, params: Any, prompts: Sequence[Any], turns, how: SamplingParams):
    """The same turns, each drawn as a completion that continues what was before it."""
    requests = []
    for place, of_request in enumerate(turns):
        p, g = divmod(place, NUM_SAMPLES)
        requests += [Request(p, p, g, len(turn.before) + TURN, continues=turn.before) for turn in of_request]
    found = dict(sampler.stream(params, prompts, requests, how, jax.random.key(7)))
    return [found[i] for i in range(len(requests))]


def gone_on_with(sampler: Sampler, params: Any, prompts: Sequence[Any], turns, how: SamplingParams):
    """(Turns, the same ones in a session that their requests come to with what was before; some have nothing)."""
    session = sampler.open(params, how, jax.random.key(7), len(prompts), NUM_SAMPLES, LONGEST)
    known = [of_request[place % len(of_request)] for place, of_request in enumerate(turns)]
    requests = [
        Request(p, p, g, len(turn.before) + TURN, continues=turn.before)
        for place, turn in enumerate(known)
        for p, g in [divmod(place, NUM_SAMPLES)]
    ]
    numbers, found = session.submit(prompts, requests), {}
    while session.num_left:
        for number, completion in session.poll():
            found[numbers.index(number)] = completion
            session.finish(number)
    return [turn.completion for turn in known], [found[place] for place in range(len(known))]


def ended_at_the_last_position(sampler: Sampler, params: Any, prompts: Sequence[Any], how: SamplingParams):
    """(Turns of a request of which the second ends in the middle of a chunk at the last position of its cache, the same
    ones behind tokens that are read).
    """
    session = sampler.open(params, how, jax.random.key(7), NUM_PROMPTS, NUM_SAMPLES, LONGEST)
    number, _ = session.submit(prompts, [Request(0, 0, 0, 1), Request(1, 1, 0, LONGEST)])
    length, turns, tokens = session._state.own.length, [], []
    while len(turns) < 3:
        for completion in (ended for place, ended in session.poll() if place == number):
            turns.append(Turn(tuple(tokens), completion))
            tokens += completion.token_ids.tolist()
            more = [7] * (length - 2 - len(tokens)) if len(turns) == 1 else []
            tokens += more
            if len(turns) < 3:
                session.go_on(number, more, length if more else length + TURN)
    assert len(turns[2].before) == length
    limits = [1, length, length + TURN]
    requests = [Request(0, 0, 0, limit, continues=turn.before) for limit, turn in zip(limits, turns, strict=True)]
    session = sampler.open(params, how, jax.random.key(7), NUM_PROMPTS, NUM_SAMPLES, LONGEST)
    numbers, found = session.submit(prompts, requests), {}
    while session.num_left:
        for number, completion in session.poll():
            found[number] = completion
            session.finish(number)
    return [turn.completion for turn in turns], [found[number] for number in numbers]


def assert_alike(left: Sequence[Completion], right: Sequence[Completion], tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=tolerance, rtol=0)
        np.testing.assert_allclose(a.policy_logprobs, b.policy_logprobs, atol=tolerance, rtol=0)


def make(family: str, pure_nnx: bool, overrides: tuple[str, ...] = (), dtype: str = "float64"):
    config = load_config(None, overrides)
    mesh = create_mesh(config.mesh, jax.devices() if overrides else jax.devices()[:1])
    policy = create_policy(tiny_config(family, dtype=dtype, param_dtype=dtype), pure_nnx)
    built: dict[Any, Programs] = {}  # by the number of kept rows, on which shapes depend
    params = noisy_params(policy.config)
    shardings = tree_shardings(params, logical_axes(policy.config), mesh, config.mesh.rules)
    params = jax.device_put(params, shardings)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(5, VOCAB, length).tolist() for length in (9, 4, 12)]

    def sampler(**options: Any) -> Sampler:
        made = Sampler(policy, mesh, shardings, rules=config.mesh.rules, **options)
        made.expect_length(16, NUM_PROMPTS, NUM_SAMPLES)
        made.engine.programs = built.setdefault(options.get("slots"), made.engine.programs)
        return made

    return sampler, params, prompts


@pytest.mark.parametrize(
    ("family", "pure_nnx", "overrides"),
    [("qwen3_5_text", True, ()), ("gemma3_text", False, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"))],
    ids=["one_device_nnx_with_states", "eight_devices_linen_with_a_window"],
)
def test_turns_are_those_of_single_calls(family, pure_nnx, overrides):
    with jax.enable_x64():
        make_sampler, params, prompts = make(family, pure_nnx, overrides)
        how = sampling(repetition_penalty=1.2, frequency_penalty=0.1)
        turns, session = play(make_sampler(slots=8), params, prompts, how)
        flat = [turn.completion for of_request in turns for turn in of_request]
        assert len({completion.finish_reason for completion in flat}) == 2, "some end by an EOS, some by their limit"
        assert_alike(flat, in_single_calls(make_sampler(), params, prompts, turns, how), 1e-10)
        late, again = play(make_sampler(slots=8), params, prompts, how, delay=3)
        assert_alike([turn.completion for own in late for turn in own], flat, 1e-10)
        assert_alike(*gone_on_with(make_sampler(slots=8), params, prompts, turns, how), 1e-10)
        assert_alike(*ended_at_the_last_position(make_sampler(slots=8), params, prompts, how), 1e-10)
        observed = sum(len(own[-1].before) - sum(len(t.completion.token_ids) for t in own[:-1]) for own in turns)
        assert session.num_read == again.num_read == observed
        assert session.num_read_again == again.num_read_again == 0


@pytest.mark.long  # in CI: tests/sampler/test_states.py
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_where_rows_are_given_away_their_tokens_are_read_again_and_nothing_else_changes(family, monkeypatch):
    plan = slot_sampler.turn_shape
    with jax.enable_x64():
        make_sampler, params, prompts = make(family, True)
        how = sampling(stop_strings=("kk", "b"), min_completion_length=2)
        text = {"decode_text": decode_text, "stop_chunk": 3}
        turns, session = play(make_sampler(slots=8, **text), params, prompts, how, delay=2)
        # A state knows no way back from the tokens behind a stop string.
        assert (session.num_read_again == 0) == (family == "qwen3")
        fewer = {"num_kept": 2, "num_active": 2}  # of the rows of three prompts
        monkeypatch.setattr(slot_sampler, "turn_shape", lambda *args: dataclasses.replace(plan(*args), **fewer))
        keep, generate, written, copied = slot_sampler.Engine.keep, slot_sampler.Engine.generate, [], set()

        def noted(engine, state, slots, rows):
            written.extend([row for row in of_shard if row < 2] for of_shard in rows.tolist())
            return keep(engine, state, slots, rows)

        def noted_rows(*arguments):
            copied.add(arguments[-1] is not None)
            return generate(*arguments)

        monkeypatch.setattr(slot_sampler.Engine, "keep", noted)
        monkeypatch.setattr(slot_sampler.Engine, "generate", noted_rows)
        few, session = play(make_sampler(slots=7, **text), params, prompts, how, delay=2)
        assert session.num_read_again > 0
        assert all(len({*rows}) == len(rows) for rows in written), "no row is written twice at a time, in any order"
        assert copied == {True, False}, "with prompts that fit into the rows that a chunk copies, and with more"
        flat = [turn.completion for own in turns for turn in own]
        assert {"stop", "eos"} <= {completion.finish_reason for completion in flat}
        assert min(len(completion.token_ids) for completion in flat) == 3, "the minimum is that of each turn"
        assert_alike([turn.completion for own in few for turn in own], flat, 1e-10)


def test_a_session_says_what_it_cannot_draw():
    with jax.enable_x64():
        make_sampler, params, prompts = make("qwen3", True)
        sampler = make_sampler()
        session = sampler.open(params, sampling(), jax.random.key(0), 1, 1, LONGEST)
        with pytest.raises(ValueError, match="limit must be between 1"):
            session.submit([prompts[0]], [Request(0, 0, 0, LONGEST + 1)])
        assert not session.has_work
        assert session.poll() == []
        with pytest.raises(ValueError, match=r"sampling\.kv_memory must allow at least one completion of 120 tokens"):
            make_sampler(kv_bytes=1000).check_turns(1, 1, LONGEST)
        sampler.expect([[1] * 100 + prompt for prompt in prompts])
        with pytest.raises(ValueError, match="must be planned by expect_length"):
            sampler.check_turns(1, 1, LONGEST)


def test_nothing_is_compiled_after_the_warm_up_whatever_slots_are_dropped():
    make_sampler, params, prompts = make("qwen3", True, dtype="float32")  # a background thread is not in 64-bit mode
    sampler, how = make_sampler(), sampling(presence_penalty=0.1)
    sampler.warm_up_turns(params, NUM_PROMPTS, 8, how, LONGEST)
    sampler.engine.programs.wait()
    jax.random.key(7)  # a program of its own
    for delay in (0, 4):
        with CompileCounter() as compiles:
            _, session = play(sampler, params, prompts, how, delay=delay, num_samples=8, num_short=6)
        assert compiles.count == 0
        assert session._state.own.num_rows < NUM_PROMPTS * 8, "slots were dropped at the end"
