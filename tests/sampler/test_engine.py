"""The engine by itself: prefill, insert, generate and resize, each called as the sampler calls it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.cache import named_arrays, position_axis
from rl.models.config import logical_axes
from rl.models.flavours import create_policy
from rl.models.inputs import Inputs, empty_inputs, plain_inputs
from rl.models.policy import Policy
from rl.sampler.decoding import ChunkReport, Requests
from rl.sampler.engine import DecodeState, Engine, Shape
from rl.sampler.token_draw import SamplingParams
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

GREEDY = SamplingParams(max_completion_length=12, temperature=0.0, eos_ids=())
PROMPT_LENGTHS = (6, 8)  # of the two prompts of each shard
TABLE_LENGTH = 16
CHUNK = 32


class Setup(NamedTuple):
    """prompts: two of each shard, [shards][2]. expected: their greedy completions, [shards][2][12]."""

    policy: Policy
    params: Any
    engine: Engine
    prompts: list[list[list[int]]]
    expected: list[list[list[int]]]


def argmax_loop(policy: Policy, params: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """What follows each prompt when the most likely token is taken, by full forward passes without a cache."""
    rows, length = [list(prompt) for prompt in prompts], max(map(len, prompts)) + num_tokens

    @jax.jit
    def forward(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return policy.unembed(params, policy.hidden(params, plain_inputs(tokens_BT)))

    for _ in range(num_tokens):
        tokens_BT = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
        for row, logits_TV in zip(rows, np.asarray(forward(params, tokens_BT)), strict=True):
            row.append(int(logits_TV[len(row) - 1].argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.fixture(
    scope="module",
    params=[(True, ()), (False, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"))],
    ids=["one_device_nnx", "eight_devices_linen"],
)
def setup(request) -> Setup:
    pure_nnx, overrides = request.param
    config = load_config(None, overrides)
    mesh = create_mesh(config.mesh, jax.devices() if overrides else jax.devices()[:1])
    policy = create_policy(tiny_config("qwen3", tie_word_embeddings=False), pure_nnx)
    params = noisy_params(policy.config)
    shardings = tree_shardings(params, logical_axes(policy.config), mesh, config.mesh.rules)
    params = jax.device_put(params, shardings)
    engine = Engine(policy, mesh, shardings, rules=config.mesh.rules)
    assert engine.num_shards == (4 if overrides else 1)
    rng = np.random.default_rng(1)
    flat = [rng.integers(0, VOCAB, length).tolist() for _ in range(engine.num_shards) for length in PROMPT_LENGTHS]
    expected = argmax_loop(policy, params, flat, GREEDY.max_completion_length)
    assert min(len(set(token_ids)) for token_ids in expected) > 2, "one token over and over would tell little"

    def by_shard(rows: list[list[int]]) -> list[list[list[int]]]:
        return [rows[first : first + 2] for first in range(0, len(rows), 2)]

    return Setup(policy, params, engine, by_shard(flat), by_shard(expected))


def pack(rows: Sequence[Sequence[Sequence[int]]]) -> Inputs:
    """Rows of prompts without their last tokens; groups are counted in the row."""
    inputs = empty_inputs(len(rows), TABLE_LENGTH)
    for number, prompts in enumerate(rows):
        cursor = 0
        for group, prompt in enumerate(prompts):
            span = slice(cursor, cursor + len(prompt) - 1)
            inputs.tokens_BT[number, span], inputs.positions_BT[number, span] = prompt[:-1], np.arange(len(prompt) - 1)
            inputs.group_ids_BT[number, span] = group
            cursor += len(prompt) - 1
    return inputs


def shape_of(
    setup: Setup, slots: int, length: int, table_rows: int = 1, prefill_rows: int = 1, rows_per_prompt: int = 1
) -> Shape:
    """Slots and rows are those of a shard."""
    num_shards = setup.engine.num_shards
    return Shape(
        num_slots=slots * num_shards,
        length=length,
        table_rows=table_rows * num_shards,
        table_length=TABLE_LENGTH // rows_per_prompt,
        rows_per_prompt=rows_per_prompt,
        prefill_rows=prefill_rows * num_shards,
        num_readers=slots,
        common_length=0,
        num_waiting=4,
    )


def start(setup: Setup, slots: int, length: int, rows_per_prompt: int = 1) -> DecodeState:
    """Idle slots over a table with the two prompts of a shard in one row, or cut into several, the last part first."""
    shape = shape_of(setup, slots, length, table_rows=rows_per_prompt, rows_per_prompt=rows_per_prompt)
    state = setup.engine.init_state(shape, GREEDY, jax.random.key(0))
    prefix = setup.engine.prefill(setup.params, pack(setup.prompts))
    backwards = np.arange(rows_per_prompt, dtype=np.int32)[::-1]
    return setup.engine.insert(state, prefix, np.tile(backwards, (setup.engine.num_shards, 1, 1)))


def generate(
    setup: Setup,
    state: DecodeState,
    asked: Sequence[tuple[int, int, int]] = (),
    cancelled: Sequence[bool] | None = None,
    few: int = 0,
) -> tuple[DecodeState, ChunkReport]:
    """One call of the engine; every shard has the same requests (id, prompt, limit) and the same cancelled slots."""
    num_shards, shape = setup.engine.num_shards, state.shape
    waiting = (num_shards, shape.num_waiting)
    fields: dict[str, np.ndarray] = {
        name: np.zeros(waiting, np.int32) for name in Requests._fields if name not in ("prompt_tokens", "rules")
    }
    fields["seeds"], fields["seeded"] = fields["seeds"].astype(np.uint32), fields["seeded"].astype(bool)
    fields["prefix_rows"] = np.full((num_shards, shape.num_waiting, shape.rows_per_prompt), -1, np.int32)
    last_row = shape.rows_per_prompt - 1
    for shard, prompts in enumerate(setup.prompts):
        for place, (request, prompt, limit) in enumerate(asked):
            values = {"request_ids": request, "limits": limit, "group_ids": prompt}
            values |= {"last_tokens": prompts[prompt][-1], "prompt_lengths": len(prompts[prompt])}
            for name, value in values.items():
                fields[name][shard, place] = value
            # Where the table is cut, the first prompt ends in the first part and the second one goes on in the next.
            rows = [last_row, last_row - 1][: min(prompt, last_row) + 1]
            fields["prefix_rows"][shard, place, : len(rows)] = rows
    num_requests = np.full(num_shards, len(asked), np.int32)
    cancelled_B = np.tile(cancelled or [False] * (shape.num_slots // num_shards), num_shards)
    key = jax.random.key(0)
    return setup.engine.generate(
        setup.params, state, Requests(**fields), num_requests, key, cancelled_B, few * num_shards, CHUNK
    )


def drawn(setup: Setup, report: ChunkReport) -> list[dict[int, list[int]]]:
    """What a chunk drew, per shard by request; every shard drew for the same requests in the same slots and steps."""
    num_shards, num_steps = setup.engine.num_shards, int(report.num_steps)
    ids, tokens = (
        np.asarray(column)[:num_steps].reshape(num_steps, num_shards, -1).swapaxes(0, 1)
        for column in (report.columns.request_ids, report.columns.tokens)
    )
    assert (ids == ids[0]).all()
    numbers = np.unique(ids[ids >= 0]).tolist()
    return [{number: tokens_CB[ids[0] == number].tolist() for number in numbers} for tokens_CB in tokens]


def slots_by_step(setup: Setup, report: ChunkReport) -> list[list[int]]:
    """The request of each slot of a shard, step by step."""
    ids = np.asarray(report.columns.request_ids)[: int(report.num_steps)]
    return ids.reshape(len(ids), setup.engine.num_shards, -1)[:, 0].tolist()


def entries(name: str, array: jax.Array, picked_PT: np.ndarray) -> np.ndarray:
    """What the array of a cache holds at the picked positions, one after another."""
    return np.moveaxis(np.asarray(array), position_axis(name), 1)[picked_PT]


def test_a_prompt_has_the_same_keys_and_values_packed_in_chunks_or_alone(setup):
    inputs = pack(setup.prompts)
    group_ids = inputs.group_ids_BT
    alone = [pack([prompts[number : number + 1] for prompts in setup.prompts]) for number in range(2)]
    whole = setup.engine.prefill(setup.params, inputs)
    # Three lengths of the cache, and a last piece that starts before the end of the one before it.
    pieces = setup.engine.prefill(setup.params, inputs, chunk=5)
    parts_alone = [setup.engine.prefill(setup.params, one) for one in alone]
    with pytest.raises(AssertionError, match="grow by one"):
        setup.engine.prefill(setup.params, inputs._replace(positions_BT=2 * inputs.positions_BT))
    assert (np.asarray(whole.group_ids) == group_ids).all()
    assert (np.asarray(pieces.group_ids) == group_ids).all()
    for number in range(2):
        for (name, packed), (_, chunked), (_, by_itself) in zip(
            *map(named_arrays, (whole, pieces, parts_alone[number])), strict=True
        ):
            if name == "group_ids":
                continue
            expected = entries(name, by_itself, alone[number].group_ids_BT >= 0)
            assert len(expected) == setup.engine.num_shards * (PROMPT_LENGTHS[number] - 1)
            for array in (packed, chunked):
                np.testing.assert_allclose(entries(name, array, group_ids == number), expected, rtol=0, atol=1e-5)


def test_rows_are_inserted_where_told_past_the_end_nowhere_and_others_stay(setup):
    engine, num_shards = setup.engine, setup.engine.num_shards
    state = engine.init_state(shape_of(setup, 2, 16, table_rows=3, prefill_rows=2), GREEDY, jax.random.key(0))

    def insert(state: DecodeState, rows: np.ndarray) -> tuple[DecodeState, Any]:
        """A prefill with a row for each prompt goes to these rows of the table; and what it held."""
        prefix = engine.prefill(setup.params, pack([[prompt] for prompts in setup.prompts for prompt in prompts]))
        held = jax.device_get(prefix)
        return engine.insert(state, prefix, rows[..., None].astype(np.int32)), held

    # Each shard has places of its own: 2 and 0 of the first, then 0 and 1 of the second, ...; 3 is past the end.
    shift = np.arange(num_shards)[:, None]
    first, second = (np.array([[2, 0]]) + shift) % 3, (np.array([[1]]) + shift) % 3
    second = np.concatenate([second, np.full((num_shards, 1), 3)], axis=1)
    state, first_held = insert(state, first)
    assert state.table is not None
    empty = np.asarray(state.table.group_ids).reshape(num_shards, 3, -1)[shift[:, 0], second[:, 0]]
    assert (empty == -1).all()
    state, second_held = insert(state, second)
    assert state.table is not None
    parts = (state.table, first_held, second_held)
    for (name, table), (_, one), (_, two) in zip(*map(named_arrays, parts), strict=True):
        table, one, two = (np.asarray(x).reshape(num_shards, -1, *x.shape[1:]) for x in (table, one, two))
        for shard in range(num_shards):
            np.testing.assert_array_equal(table[shard, first[shard]], one[shard], err_msg=name)
            np.testing.assert_array_equal(table[shard, second[shard, 0]], two[shard, 0], err_msg=name)


@pytest.mark.parametrize("rows_per_prompt", [1, 2])
def test_a_slot_is_handed_over_in_the_chunk_and_greedy_tokens_are_those_of_an_argmax_loop(setup, rows_per_prompt):
    asked = [(5, 0, 3), (6, 1, 9), (7, 0, 6)]
    state, report = generate(setup, start(setup, slots=2, length=16, rows_per_prompt=rows_per_prompt), asked)
    assert slots_by_step(setup, report) == [[5, 6]] * 3 + [[7, 6]] * 6
    assert report.num_taken.tolist() == [3] * setup.engine.num_shards
    assert (report.request_ids == -1).all()
    for found, expected in zip(drawn(setup, report), setup.expected, strict=True):
        assert found == {request: expected[prompt][:limit] for request, prompt, limit in asked}
    # Nothing waits and nobody draws.
    _, report = generate(setup, state)
    assert int(report.num_steps) == 0


def test_few_busy_slots_end_a_chunk_and_a_cancelled_slot_takes_the_next_request(setup):
    state, report = generate(setup, start(setup, slots=2, length=16), [(5, 0, 2), (6, 1, 9)], few=1)
    assert slots_by_step(setup, report) == [[5, 6]] * 2
    assert report.request_ids.tolist() == [-1, 6] * setup.engine.num_shards
    assert report.num_drawn.tolist() == [2, 2] * setup.engine.num_shards
    asked = [(7, 1, 4), (8, 0, 3)]
    state, report = generate(setup, state, asked, cancelled=[False, True])
    assert slots_by_step(setup, report) == [[7, 8]] * 3 + [[7, -1]]
    # What the slots' own cache holds of earlier completions is not seen.
    for found, expected in zip(drawn(setup, report), setup.expected, strict=True):
        assert found == {request: expected[prompt][:limit] for request, prompt, limit in asked}


def test_resize_keeps_the_slots_it_is_told_and_a_longer_cache_draws_the_same(setup):
    asked = [(0, 0, 1), (1, 1, 12), (2, 0, 1), (3, 0, 12)]
    state, report = generate(setup, start(setup, slots=4, length=4), asked)
    # The chunk is over when the first slot has filled its cache.
    assert slots_by_step(setup, report) == [[0, 1, 2, 3]] + [[-1, 1, -1, 3]] * 3
    before = drawn(setup, report)
    kept = np.tile(np.array([[3, 1]], np.int32), (setup.engine.num_shards, 1))
    state = setup.engine.resize(state, kept, 12)
    assert (state.shape.num_slots, state.shape.length) == (2 * setup.engine.num_shards, 12)
    assert (state.own.num_rows, state.own.length) == (2 * setup.engine.num_shards, 12)
    state, report = generate(setup, state)
    assert slots_by_step(setup, report) == [[3, 1]] * 8
    for first, rest, expected in zip(before, drawn(setup, report), setup.expected, strict=True):
        assert first[1] + rest[1] == expected[1]
        assert first[3] + rest[3] == expected[0]
