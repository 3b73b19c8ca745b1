"""A session that stays open: requests of all kinds come and go, and what is left of them is nothing."""

import string

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.config import logical_axes
from rl.models.flavours import create_policy
from rl.run.metrics import CompileCounter
from rl.sampler.contract import Request
from rl.sampler.slot_rules import DrawRules, SlotSampling
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

LIMIT, LONGEST, CHUNK, KEPT = 20, 50, 4, 2
LETTERS = dict(enumerate(string.ascii_lowercase[:11] * 9, start=5))
KEY = 7


def decode_text(token_ids) -> str:
    return "".join(LETTERS.get(int(token), "") for token in token_ids)


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["nnx", "linen_on_two_shards"]
)
def setup(request):
    config = load_config(None, () if request.param else ("mesh.data=2",))
    mesh = create_mesh(config.mesh, jax.devices()[: 1 if request.param else 2])
    policy = create_policy(tiny_config("qwen3"), request.param)
    params = noisy_params(policy.config)
    shardings = tree_shardings(params, logical_axes(policy.config), mesh, config.mesh.rules)
    sampler = Sampler(policy, mesh, shardings, rules=config.mesh.rules, decode_text=decode_text)
    sampler.expect_length(64)
    return sampler, jax.device_put(params, shardings)


@pytest.fixture(scope="module")
def session(setup):
    sampler, params = setup
    sampling = SlotSampling(LIMIT, eos_ids=(3, 4), top_logprobs=2)
    arguments = sampling, 4, KEPT, LONGEST, CHUNK
    sampler.warm_up_endless(params, *arguments)
    sampler.engine.programs.wait()
    sampling, num_slots, *sizes = arguments
    return sampler.open_endless(params, sampling, jax.random.key(KEY), num_slots, *sizes)


def prompt(seed: int, length: int = 9) -> list[int]:
    return np.random.default_rng(seed).integers(5, VOCAB, length).tolist()


def ended(session, number: int):
    """The completion of a request, once it has ended; what others end with is put back into their place."""
    for _ in range(200):
        for other, completion in session.poll():
            if other == number:
                return completion
            session.finish(other)
    raise AssertionError("the request does not end")


def alone(setup, tokens, request: Request):
    """The completion that a call with this request alone draws."""
    sampler, params = setup
    call = SamplingParams(LIMIT, eos_ids=(3, 4), top_logprobs=2)
    return dict(sampler.stream(params, [tokens], [request], call, jax.random.key(KEY)))[0]


def assert_same(found, expected) -> None:
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert (found.finish_reason, found.stop_reason) == (expected.finish_reason, expected.stop_reason)
    np.testing.assert_allclose(found.policy_logprobs, expected.policy_logprobs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.sampler_logprobs, expected.sampler_logprobs, atol=1e-5, rtol=0)


def test_each_request_ends_at_its_own_stop_strings(setup, session):
    first = Request(0, 0, 0, LIMIT, 5, rules=DrawRules(ends_at_eos=False))
    text = decode_text(alone(setup, prompt(1), first).token_ids)
    rules = [DrawRules(ends_at_eos=False, stop_strings=stops) for stops in ((), (text[6:8],), ("x", text[9:11]))]
    requests = [Request(0, 0, 0, LIMIT, 5, rules=own) for own in rules]
    with CompileCounter() as compiles:
        numbers = [session.submit([prompt(1)], [request])[0] for request in requests]
        found = {}
        for _ in range(50):
            found |= dict(session.poll())
    assert compiles.count == 0, "all was compiled before"
    for number, request in zip(numbers, requests, strict=True):
        assert_same(found[number], alone(setup, prompt(1), request))
        session.finish(number)
    assert [found[number].finish_reason for number in numbers] == ["length", "stop", "stop"]


def test_a_request_that_follows_another_draws_as_if_all_before_it_were_its_prompt(setup, session):
    first = Request(0, 0, 0, 8, 1, rules=DrawRules(temperature=0.9, ends_at_eos=False))
    (number,) = session.submit([prompt(2)], [first])
    before = ended(session, number).token_ids.tolist()
    rules = DrawRules(
        repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, min_completion_length=6, top_k=30
    )
    read_before = session.num_read
    for seed, num_kept, more in ((11, len(before), prompt(3, 3)), (12, len(before) - 1, prompt(4, 5))):
        request = Request(0, 0, 0, 12, seed, rules=rules)
        whole = [*prompt(2), *before[:num_kept], *more]
        with CompileCounter() as compiles:
            session.follow(number, num_kept, more, request)
            completion = ended(session, number)
        assert compiles.count == 0, "all was compiled before"
        assert_same(completion, alone(setup, whole, request))
        before = [*before[:num_kept], *more, *completion.token_ids.tolist()]
    assert session.num_read - read_before == 8
    assert session.num_read_again == 0
    with pytest.raises(ValueError, match=r"limit must be between 1 and sampling.max_completion_length"):
        session.follow(number, len(before), [], Request(0, 0, 0, 0, 1, rules=DrawRules()))
    session.finish(number)


def test_what_is_drawn_so_far_is_the_beginning_of_what_is_drawn(session):
    rules = DrawRules(ends_at_eos=False)
    (number,) = session.submit([prompt(5)], [Request(0, 0, 0, LIMIT, 3, rules=rules)])
    parts, num_seen, completion = [], 0, None
    while completion is None:
        completion = dict(session.poll()).get(number)
        if completion is None and (drawn := session.drawn(number, num_seen)) is not None:
            parts.append(drawn)
            num_seen += len(drawn[0])
            assert session.drawn(number, num_seen) is None
            np.testing.assert_array_equal(session.drawn(number, num_seen - 1)[0], drawn[0][-1:])
    assert num_seen >= CHUNK
    columns = completion.token_ids, completion.sampler_logprobs, completion.policy_logprobs
    columns = *columns, completion.top_ids, completion.top_logprobs
    for place, column in enumerate(columns):
        seen = np.concatenate([part[place] for part in parts])
        np.testing.assert_array_equal(seen, column[:num_seen])
    session.finish(number)


def test_requests_that_are_cancelled_anywhere_change_no_other_and_leave_nothing(setup, session):
    """Also: nothing compiles, whatever comes."""
    rules = DrawRules(ends_at_eos=False)
    kept = Request(0, 0, 0, LIMIT, 9, rules=rules)
    expected = alone(setup, prompt(6), kept)
    with CompileCounter() as compiles:
        numbers = [session.submit([prompt(10 + i)], [Request(0, 0, 0, LIMIT, i, rules=rules)])[0] for i in range(12)]
        (number,) = session.submit([prompt(6)], [kept])
        session.cancel(numbers[-1])  # before its prompt is read
        session.poll()
        session.cancel(numbers[5])  # waits for a slot
        session.cancel(numbers[0])  # draws
        ends = dict(session.poll())
        while len(ends) < 3:
            ends |= dict(session.poll())
        first, second, *_ = ends
        session.follow(first, LIMIT, [7], Request(0, 0, 0, 5, 1, rules=rules))
        session.cancel(first)  # was to go on
        session.cancel(second)  # has ended
        gone = {numbers[-1], numbers[5], numbers[0], first, second}
        for other in {*ends} - {first, second}:
            session.finish(other)  # the prompts of those that are kept leave no room in the table
        found = {}
        for _ in range(100):
            for other, completion in session.poll():
                found[other] = completion
                session.finish(other)
        assert not {*found} & gone
    assert compiles.count == 0
    assert_same({**ends, **found}[number], expected)
    schedule = session._schedule
    books = schedule._requests, schedule._prompts, schedule._uses, schedule._rows_of, schedule._drawing, schedule.ended
    assert [len(book) for book in (*books, session._turns)] == [0] * 7
    assert not schedule._left.any()
    assert sum(map(len, session._free_rows)) == KEPT
    assert session.num_left == 0
