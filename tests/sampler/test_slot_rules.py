"""Requests with rules of their own: the tokens and log-probs, bit for bit, of calls with those rules."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.config import logical_axes
from rl.models.flavours import create_policy
from rl.run.metrics import CompileCounter
from rl.sampler import slot_session
from rl.sampler.contract import Completion, Request, check_requests, refuse_slot_rules
from rl.sampler.slot_rules import DrawRules, RuleArrays, SlotSampling, device_rules, draw_by_slot, rule_arrays
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import Draw, SamplingParams, TokenCounts, draw
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

EOS = (3, 4)
MANY_EOS = tuple(range(3, 23))  # so that a tiny model draws one
LIMIT = 24
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.37, "presence_penalty": 0.21}
ALL = DrawRules(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, min_completion_length=5, **PENALTIES)
RULES = [
    DrawRules(),
    DrawRules(temperature=0),
    ALL,
    DrawRules(temperature=0.7, ends_at_eos=False, min_completion_length=5),
    DrawRules(temperature=0.7, top_p=0.8),
    DrawRules(temperature=1.3, min_p=0.05, min_completion_length=20),
    DrawRules(temperature=0.6, top_k=5),
    DrawRules(temperature=0, frequency_penalty=0.7, top_k=3),
    DrawRules(temperature=0.7, repetition_penalty=1.17, frequency_penalty=-0.3),
    DrawRules(presence_penalty=0.3, top_k=VOCAB + 5),
]
CALL = SamplingParams(LIMIT, eos_ids=EOS)


def rules_of_rows(rules: list[DrawRules], call: SamplingParams, dtype: Any) -> RuleArrays:
    arrays = rule_arrays(partial(np.zeros, len(rules)), dtype)
    for row, own in enumerate(rules):
        for array, value in zip(arrays, device_rules(own.applied_to(call), np.dtype(dtype)), strict=True):
            array[row] = value
    return arrays


@pytest.mark.parametrize("is_wide", [False, True], ids=["float32", "float64"])
def test_rows_with_rules_side_by_side_are_drawn_as_by_programs_with_those_rules(is_wide):
    call = dataclasses.replace(CALL, top_logprobs=3, logit_bias=((7, 1.3),), forbidden_ids=(9,))
    rules = RULES[::3] if is_wide else RULES
    with jax.enable_x64(is_wide):
        dtype, rng, num_rows = np.float64 if is_wide else np.float32, np.random.default_rng(0), 12 * len(rules)
        logits_BV = (rng.normal(size=(num_rows, VOCAB)) * 4).astype(dtype)
        logits_BV[:, 50:60] = np.round(logits_BV[:, 50:60])  # some tie, some are 0
        uniform_B = rng.random(num_rows).astype(dtype)
        positions_B = jnp.asarray(rng.integers(0, 25, num_rows), jnp.int32)
        counts = TokenCounts(
            jnp.asarray(rng.poisson(0.5, (num_rows, VOCAB)), jnp.int32),
            jnp.asarray(rng.random((num_rows, VOCAB)) < 0.2),
        )
        num_traces = []

        @partial(jax.jit, static_argnums=2)
        def slot_program(*arguments):
            num_traces.append(1)
            return draw_by_slot(*arguments)

        def by_slot(rules: list[DrawRules]) -> Draw:
            arrays, live_B = rules_of_rows(rules, call, dtype), jnp.ones(num_rows, bool)
            return slot_program(
                logits_BV, uniform_B, SlotSampling.of(call).compiled, arrays, positions_B, live_B, counts
            )

        found = by_slot(rules * 12)
        for place, own in enumerate(rules):
            static = own.applied_to(call)

            @jax.jit
            def program(logits_BV, uniform_B, positions_B, counts, static=static):
                return draw(logits_BV, uniform_B, static, positions_B < static.min_completion_length, counts)

            expected = program(logits_BV, uniform_B, positions_B, counts)
            for name, left, right in zip(Draw._fields[:-1], found, expected, strict=False):
                np.testing.assert_array_equal(left[place :: len(rules)], right[place :: len(rules)], f"{own} {name}")
            if place in (0, 1):  # rules that no row has on are skipped
                alone = by_slot([own] * num_rows)
                jax.tree.map(np.testing.assert_array_equal, alone[:-1], expected[:-1])
        assert len(num_traces) == 1


class Setup:
    """A tiny model, and samplers of it; all of them share their programs."""

    def __init__(self, pure_nnx: bool, overrides: tuple[str, ...]) -> None:
        config = load_config(None, overrides)
        self.mesh = create_mesh(config.mesh, jax.devices() if overrides else jax.devices()[:1])
        self.policy = create_policy(tiny_config("qwen3"), pure_nnx)
        params = noisy_params(self.policy.config)
        shardings = tree_shardings(params, logical_axes(self.policy.config), self.mesh, config.mesh.rules)
        self.params = jax.device_put(params, shardings)
        self.prompts = [np.random.default_rng(3).integers(5, VOCAB, 9).tolist()]
        self.sampler = Sampler(self.policy, self.mesh, shardings, rules=config.mesh.rules, slots=8)
        self.sampler.expect_length(16, 1, 8)

    def draw(self, rules: list[DrawRules | None], call: SamplingParams = CALL) -> list[Completion]:
        call = dataclasses.replace(call, eos_ids=MANY_EOS if call.eos_ids else ())
        requests = [Request(0, 0, sample, LIMIT, rules=own) for sample, own in enumerate(rules)]
        found = dict(self.sampler.stream(self.params, self.prompts, requests, call, jax.random.key(5)))
        return [found[number] for number in range(len(rules))]


@pytest.fixture(scope="module", params=["nnx", "linen_on_eight_devices"])
def setup(request) -> Setup:
    return Setup(True, ()) if request.param == "nnx" else Setup(False, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"))


def assert_equal(left: Completion, right: Completion) -> None:
    for field in ("token_ids", "sampler_logprobs", "policy_logprobs"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field), field)
    assert (left.finish_reason, left.stop_reason) == (right.finish_reason, right.stop_reason)


def test_requests_with_other_rules_in_one_call_are_those_of_calls_with_these_rules(setup, monkeypatch):
    # No slot is dropped: products of fewer rows may round otherwise, with any rules.
    monkeypatch.setattr(slot_session, "next_cache_size", lambda sizes, now, *_: now)
    mixed = setup.draw([*RULES[:7], None])
    assert {completion.finish_reason for completion in mixed} == {"eos", "length"}
    whole = mixed[3].token_ids
    assert len(whole) == LIMIT, "an EOS does not end it"
    assert np.isin(whole, MANY_EOS).any()
    for place in (0, 1, 2, 3):
        alone = setup.draw([None] * 8, RULES[place].applied_to(CALL))
        assert_equal(mixed[place], alone[place])
        if place == 0:
            assert_equal(mixed[7], alone[7])
    keys = {key for key in setup.sampler.engine.programs if key[0] == "generate"}
    assert len(keys) == 5, "one with rules by slot, and one for each of four calls without"
    with CompileCounter() as compiles:
        again = setup.draw([*reversed(RULES[3:10]), ALL])
    assert compiles.count == 0
    assert_equal(again[7], setup.draw([ALL] * 8)[7])


def test_a_session_draws_each_completion_by_its_own_rules_through_all_turns():
    with jax.enable_x64():
        setup = Setup(True, ())
        call = dataclasses.replace(CALL, max_completion_length=64)
        session = setup.sampler.open(setup.params, SlotSampling.of(call), jax.random.key(5), 1, 4, 64)
        rules = [ALL, None, DrawRules(temperature=0), DrawRules(ends_at_eos=False, top_p=0.7)]
        requests = [Request(0, 0, sample, 8, rules=own) for sample, own in enumerate(rules)]
        numbers = session.submit(setup.prompts, requests)
        begun: dict[int, tuple[int, ...]] = {}
        second: dict[int, Completion] = {}
        while session.num_left:
            for number, completion in session.poll():
                if number in begun:
                    second[number] = completion
                    session.finish(number)
                else:
                    begun[number] = (*completion.token_ids.tolist(), 11, 12)
                    session.go_on(number, (11, 12), len(begun[number]) + 8)
        rest = [
            dataclasses.replace(request, continues=begun[number], limit=len(begun[number]) + 8)
            for number, request in zip(numbers, requests, strict=True)
        ]
        of_turn = len(begun[numbers[0]]) + ALL.min_completion_length  # a call counts from its start, a session by turns
        rest[0] = dataclasses.replace(rest[0], rules=dataclasses.replace(ALL, min_completion_length=of_turn))
        found = dict(setup.sampler.stream(setup.params, setup.prompts, rest, call, jax.random.key(5)))
        for place, number in enumerate(numbers):
            assert found[place].token_ids.tolist() == second[number].token_ids.tolist()
            np.testing.assert_allclose(found[place].sampler_logprobs, second[number].sampler_logprobs, atol=1e-5)
        assert len({tuple(completion.token_ids.tolist()) for completion in second.values()}) == 4
        with pytest.raises(ValueError, match=r"requests\[0\]\.rules must be None where .* SlotSampling\.of"):
            setup.sampler.open(setup.params, call, jax.random.key(5), 1, 4, 64).submit(setup.prompts, requests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, r"requests\[1\]\.rules\.temperature must be >= 0"),
        ({"top_p": 0}, r"requests\[1\]\.rules\.top_p must be in \(0, 1\]"),
        ({"top_k": -1}, r"requests\[1\]\.rules\.top_k must be >= 0"),
        ({"min_p": 1}, r"requests\[1\]\.rules\.min_p must be in \[0, 1\)"),
        ({"repetition_penalty": 0}, r"requests\[1\]\.rules\.repetition_penalty must be finite and > 0"),
        ({"presence_penalty": float("nan")}, r"requests\[1\]\.rules\.presence_penalty must be finite"),
        ({"min_completion_length": LIMIT + 1}, r"requests\[1\]\.rules\.min_completion_length must be between 0"),
        ({"min_completion_length": LIMIT}, r"requests\[1\]\.limit must be between rules\.min_completion_length"),
    ],
)
def test_rules_out_of_range_are_refused_with_the_request(changes, message):
    requests = [Request(0, 0, 0, LIMIT), Request(0, 0, 1, LIMIT - 1, rules=DrawRules(**changes))]
    with pytest.raises(ValueError, match=message):
        check_requests(tiny_config(), None, [[5]], requests, SlotSampling.of(CALL))


def test_rules_by_slot_are_refused_where_they_cannot_be():
    with pytest.raises(ValueError, match=r"sampling\.reports_kept must be False"):
        SlotSampling.of(dataclasses.replace(CALL, reports_kept=True))
    with pytest.raises(ValueError, match="must be SamplingParams with a wave policy"):
        refuse_slot_rules("a wave policy", SlotSampling.of(CALL))
    refuse_slot_rules("a wave policy", CALL)
