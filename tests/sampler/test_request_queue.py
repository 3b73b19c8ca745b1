"""Who waits where: sizes, dealing, packing, stop strings. No model."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import decoders

from rl.sampler.contract import Request, requests_for
from rl.sampler.decoding import ChunkReport, Columns
from rl.sampler.endings import find_stop
from rl.sampler.request_queue import Schedule, common_prefix_length, deal
from rl.sampler.shape_plan import ExpectedPrompts, ShardRequests, first_shape
from rl.sampler.sizes import (
    CacheSize,
    cache_sizes,
    later_cache_sizes,
    later_session_sizes,
    next_cache_size,
    next_session_size,
    session_sizes,
    size_at_least,
    size_at_most,
)
from rl.sampler.token_draw import SamplingParams


def test_sizes_are_few_and_close():
    assert [size_at_least(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)] == [
        1,
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        12,
        16,
        24,
        32,
    ]
    assert [size_at_least(n, 4) for n in (1, 5, 8, 9, 11, 13, 15, 17, 33, 57, 64)] == [
        1,
        5,
        8,
        10,
        12,
        14,
        16,
        20,
        40,
        64,
        64,
    ]
    assert [size_at_most(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)] == [1, 2, 3, 4, 4, 6, 6, 8, 12, 16, 24]
    for steps in (2, 4):
        sizes = [size_at_least(n, steps) for n in range(1, 2000)]
        assert sizes == sorted(sizes)
        assert all(n <= size <= max(n * (1 + 1 / steps), n) for n, size in enumerate(sizes, start=1))


def test_cache_sizes_halve_and_double_and_have_steps_between():
    assert cache_sizes(64, 16) == [(64, 16), (32, 16), (16, 16), (8, 16)]
    assert cache_sizes(16, 100) == [(16, 64), (8, 64), (16, 112), (8, 112), (12, 96), (12, 112), (10, 112)]
    assert len(cache_sizes(64, 256)) == 26
    assert cache_sizes(3, 64) == [(3, 64)]
    assert {slots for slots, _ in cache_sizes(1024, 300)} == {1024, 768, 640, 512, 384, 320, 256, 192, 128, 96}
    assert {length for _, length in cache_sizes(1, 300)} == {64, 128, 256, 304}
    assert {length for slots, length in cache_sizes(1024, 300) if slots == 512} == {64, 128, 160, 256, 304}


def test_half_of_the_slots_go_once_they_can_and_a_full_cache_grows():
    sizes = cache_sizes(64, 256)
    assert next_cache_size(sizes, CacheSize(64, 64), 33, 63) == (64, 64)
    assert next_cache_size(sizes, CacheSize(64, 64), 32, 63) == (32, 64)
    assert next_cache_size(sizes, CacheSize(64, 64), 5, 63) == (8, 64)
    assert next_cache_size(sizes, CacheSize(64, 64), 64, 64) == (64, 128)
    assert next_cache_size(sizes, CacheSize(64, 64), 37, 64) == (48, 96)
    assert next_cache_size(sizes, CacheSize(48, 96), 28, 96) == (32, 128)
    assert next_cache_size(sizes, CacheSize(48, 96), 33, 96) == (40, 128)
    assert next_cache_size(sizes, CacheSize(40, 128), 32, 128) == (32, 160)
    assert next_cache_size(sizes, CacheSize(48, 192), 48, 192) == (48, 256)


def test_the_cache_of_a_session_grows_with_all_slots_and_drops_them_where_that_is_less():
    sizes = session_sizes(64, 368)
    assert [size.length for size in sizes if size.slots == 64] == [64, 128, 192, 256, 368]
    assert [size.length for size in sizes if size.slots == 32] == [368, 192, 64]
    assert next_session_size(sizes, CacheSize(64, 64), 64, 63) == (64, 64)
    assert next_session_size(sizes, CacheSize(64, 64), 64, 200) == (64, 256), "an observation is longer than a step"
    assert next_session_size(sizes, CacheSize(64, 128), 32, 100) == (32, 192)
    assert next_session_size(sizes, CacheSize(64, 128), 5, 100) == (8, 192)
    assert session_sizes(8, 40) == [(8, 48)]


@pytest.mark.parametrize(
    "plan",
    [(cache_sizes, next_cache_size, later_cache_sizes), (session_sizes, next_session_size, later_session_sizes)],
    ids=["of_a_call", "of_a_session"],
)
@pytest.mark.parametrize("most", [1, 8, 20, 64, 100])
@pytest.mark.parametrize("limit", [1, 64, 65, 256, 1000])
def test_every_need_finds_a_size_among_those_that_are_announced(most, limit, plan):
    all_sizes, next_size, later_sizes = plan
    sizes = all_sizes(most, limit)
    assert len(set(sizes)) == len(sizes)
    longest = max(size.length for size in sizes)
    reachable = [sizes[0]]
    for now in reachable:
        later = later_sizes(sizes, now)
        more = range(now.length + 1, longest, 40) if all_sizes is session_sizes else ()
        for needed in range(1, now.slots + 1):
            for filled in (0, now.length - 1, now.length, *more):
                if filled == longest:
                    continue
                size = next_size(sizes, now, needed, filled)
                assert needed <= size.slots <= now.slots
                assert size.length >= now.length
                assert size.length > filled
                assert size == now or size in later
        reachable += [size for size in later if size not in reachable]


def test_completions_that_end_at_a_steady_rate_never_need_much_more_than_they_started_with():
    sizes = cache_sizes(64, 1024)
    now, areas = CacheSize(64, 64), []
    for step in range(1, 1025):
        busy = math.ceil(64 * 0.5 ** (step / 80))
        if not (step == 1024 and now.length == 1024):
            now = next_cache_size(sizes, now, busy, step)
        areas.append(now.slots * now.length)
    assert now.length == 1024
    assert max(areas[:256]) <= 64 * 64 * 9 / 8


def test_of_random_calls_one_in_fifty_at_most_needs_a_quarter_more_than_it_started_with():
    rng, sizes, areas = np.random.default_rng(0), cache_sizes(64, 256), []
    for _ in range(200):
        lengths = rng.geometric(0.0088, 64).clip(max=256)  # a mean of 102
        now, largest = CacheSize(64, 64), 0
        for step in range(int(lengths.max())):
            now = next_cache_size(sizes, now, int((lengths > step).sum()), step)
            largest = max(largest, now.slots * now.length)
        areas.append(largest)
    assert np.mean(np.array(areas) > 64 * 64 * 5 / 4) <= 1 / 50


@pytest.mark.parametrize("num_shards", [1, 2, 8])
@pytest.mark.parametrize(("num_prompts", "num_samples"), [(5, 4), (1, 8), (3, 20), (40, 8), (2, 1)])
def test_every_request_is_dealt_once_and_evenly(num_prompts, num_samples, num_shards):
    requests = [Request(p, p, s, 9) for p in range(num_prompts) for s in range(num_samples)]
    shards = deal(requests, num_shards)
    assert len(shards) == num_shards
    assert sorted(number for pieces in shards for piece in pieces for number in piece) == list(range(len(requests)))
    assert all(len({requests[number].prompt for number in piece}) == 1 for pieces in shards for piece in pieces)
    loads = [sum(map(len, pieces)) for pieces in shards]
    largest_piece = max(len(piece) for pieces in shards for piece in pieces)
    assert max(loads) - min(loads) <= largest_piece
    if num_prompts >= num_shards:
        assert {len(piece) for pieces in shards for piece in pieces} == {num_samples}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [1, 3, 8])
def test_fewer_prompts_fit_in_the_shapes_of_more(num_samples, num_shards):
    loads = [ShardRequests.of(deal(requests_for(range(count), num_samples, 9), num_shards)) for count in range(1, 20)]
    assert all(few.fits(many, many.most_requests) for few, many in itertools.pairwise(loads))
    assert not loads[-1].fits(loads[0], loads[0].most_requests)


@pytest.mark.parametrize(("num_prompts", "num_samples", "does_fit"), [(3, 16, True), (64, 1, False), (6, 1, True)])
def test_a_call_of_fewer_samples_needs_a_table_for_more_prompts(num_prompts, num_samples, does_fit):
    """64 slots hold seven groups of 16 with what waits for them: a table for these keeps 7 slots busy with one each."""
    planned, demand = (
        ShardRequests.of(deal(requests_for(range(p), g, 9), 1)) for p, g in ((64, 16), (num_prompts, num_samples))
    )
    assert planned.prompts_at_once(64) == 7
    assert demand.fits(planned, 64) == does_fit


@pytest.mark.parametrize(
    ("counts", "num_slots", "at_once"),
    [
        ([32, *[1] * 96], 32, 49),
        ([*[1] * 96, 32], 32, 49),
        ([64, *[4] * 1318], 256, 97),
        ([1000, *[1] * 100], 256, 101),
        ([*[64] * 20, *[4] * 10], 64, 11),
        ([*[64] * 20, *[4] * 30], 64, 25),
    ],
)
def test_one_prompt_of_many_samples_leaves_the_others_room_in_the_table(counts, num_slots, at_once):
    """As many prompts as half as many requests again as there are slots, where they lie thinnest, and one more."""
    requests = [Request(p, p, s, 9) for p, count in enumerate(counts) for s in range(count)]
    demand, expected = ShardRequests.of(deal(requests, 1)), ExpectedPrompts((), (40,) * len(counts))
    shape = first_shape(1, demand, expected, 9, num_slots, None)
    assert demand.prompts_at_once(num_slots) == at_once
    assert (shape.num_slots, shape.num_readers) == (num_slots, min(max(counts), num_slots))
    assert at_once <= shape.table_rows <= 1.25 * at_once


def test_a_prompt_with_most_of_the_requests_is_dealt_to_several_shards():
    requests = [Request(p, p, s, 9) for p, count in enumerate([100, 1, 1, 1, 1, 1, 1, 1, 1]) for s in range(count)]
    assert max(sum(map(len, pieces)) for pieces in deal(requests, 8)) <= 17


@pytest.mark.parametrize("seed", range(20))
def test_no_shard_gets_a_prompt_twice_however_uneven_the_requests(seed):
    """Its row would hold the prompt twice under one number, and slots would see every key of it twice."""
    rng = np.random.default_rng(seed)
    counts = [15, 15, 3] if seed == 0 else rng.integers(1, 20, rng.integers(1, 7)).tolist()
    requests = [Request(p, p, s, 9) for p, count in enumerate(counts) for s in range(count)]
    shards = deal(requests, 8)
    assert sorted(number for pieces in shards for piece in pieces for number in piece) == list(range(len(requests)))
    for pieces in shards:
        prompts = [requests[piece[0]].prompt for piece in pieces]
        assert len(set(prompts)) == len(prompts)


def test_the_common_prefix_leaves_every_prompt_its_last_token():
    assert common_prefix_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_prefix_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix_length([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix_length([[1], [1, 2, 3]]) == 0
    assert common_prefix_length([[5, 2, 3], [1, 2, 3]]) == 0
    assert common_prefix_length([]) == 0


def test_a_stop_string_is_found_at_the_first_completing_token_across_boundaries():
    pieces = {1: "ab", 2: "cd", 3: "", 4: "e"}

    def text(ids: Sequence[int]) -> str:
        return "".join(pieces[i] for i in ids)

    def find(ids, stops, num_checked=0, minimum=0, num_before=0):
        sampling = SamplingParams(max_completion_length=24, stop_strings=stops, min_completion_length=minimum)
        return find_stop(ids, num_checked, sampling, text, num_before)

    assert find([1, 2, 4], ("bc",)) == (2, "bc")
    assert find([1, 3, 2, 4], ("bc", "de")) == (3, "bc")
    assert find([1, 2, 4], ("zz", "de", "cde")) == (3, "de")
    assert find([1, 2, 4], ("abcde",)) == (3, "abcde")
    assert find([1, 2, 4], ("x",)) is None
    assert find([1, 2, 4], ("de",), num_checked=2) == (3, "de")
    # Completed by the first two tokens: does not count. Reaching into them: counts.
    assert find([1, 2, 4], ("bc",), minimum=2) is None
    assert find([1, 2, 1, 2], ("bc",), minimum=2) == (4, "bc")
    assert find([1, 2, 4], ("cde",), minimum=2) == (3, "cde")
    assert find([1, 2], ("bc",), minimum=2) is None
    # Shown by tokens that were there before: does not count, however short the least completion is.
    assert find([1, 2, 4], ("bc",), 2, num_before=2) is None
    assert find([1, 2, 4], ("bc", "cde"), 2, num_before=2) == (3, "cde")
    assert find([1, 2, 1, 2], ("bc",), 2, 1, num_before=2) == (4, "bc")


def bytes_text(ids: Sequence[int]) -> str:
    """As byte-level tokenizers decode: an unfinished character is one U+FFFD."""
    return bytes(ids).decode(errors="replace")


def byte_fallback_text(ids: Sequence[int]) -> str:
    """As tokenizers of Llama 2 and Mistral decode: of bytes in a row all are U+FFFD while one character is unfinished.
    256 and what follows are whole words.
    """
    words = ("\u2581hi", "yo")
    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return decoder.decode([f"<0x{i:02X}>" if i < 256 else words[i - 256] for i in ids])


def stop_in_chunks(ids, stops, text, chunk, minimum=0):
    sampling = SamplingParams(max_completion_length=24, stop_strings=stops, min_completion_length=minimum)
    for num_checked in range(0, len(ids), chunk):
        stop = find_stop(ids[: num_checked + chunk], num_checked, sampling, text)
        if stop is not None:
            return stop
    return None


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_a_stop_string_counts_where_the_minimum_length_ends_inside_its_last_character(chunk):
    def find(stop: str, minimum: int) -> tuple[int, str] | None:
        return stop_in_chunks(list("xy\u20acab".encode()), (stop,), bytes_text, chunk, minimum)

    assert [find("y\u20ac", minimum) for minimum in range(7)] == [(5, "y\u20ac")] * 5 + [None] * 2
    assert [find("\u20ac", minimum) for minimum in range(7)] == [(5, "\u20ac")] * 5 + [None] * 2
    assert [find("\u20aca", minimum) for minimum in range(7)] == [(6, "\u20aca")] * 6 + [None]


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("last", [257, ord("!"), 0xF0])
def test_bytes_that_hide_a_stop_string_for_a_while_or_for_good_change_nothing(chunk, last):
    newline, emoji = ord("\n"), list("\U0001f600".encode())
    ids = [*[256] * 6, newline, *emoji, last, newline, 257]
    shown = [byte_fallback_text(ids[:count]).count("\n") for count in range(6, 12)]
    assert shown == [0, 1, 0, 0, 0, 1]
    assert stop_in_chunks(ids, ("\n",), byte_fallback_text, chunk) == (7, "\n")
    assert stop_in_chunks(ids[:9], ("\n",), byte_fallback_text, chunk) == (7, "\n")
    assert stop_in_chunks([*ids[:9], 257], ("\n",), byte_fallback_text, chunk) == (7, "\n")
    # What the first tokens complete does not count when it is seen again.
    later = None if last == 0xF0 else (13, "\n")
    for minimum in range(7, 12):
        assert stop_in_chunks(ids, ("\n",), byte_fallback_text, chunk, minimum) == later


@pytest.mark.parametrize("text", [bytes_text, byte_fallback_text])
@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_does_not_depend_on_how_many_tokens_are_looked_at_together(text, seed):
    """The completion ends with the first token after which the text holds one, whatever follows."""
    rng = np.random.default_rng(seed)
    pieces = [b"a", b"\n", "\u20ac".encode(), "\U0001f600".encode(), b"\xf0\x9f", b"\x80"]
    pieces = [*pieces, b"", b""]  # nothing stands for a word
    ids: list[int] = []
    while len(ids) < 20:
        ids += list(pieces[rng.integers(len(pieces))]) or ([256] if text is byte_fallback_text else [32])
    for stops in (("\n",), ("a\n", "\u20ac"), ("\U0001f600\u20ac", "\u20aca"), ("\ufffd",)):
        for minimum in (0, 3, 6):
            found = {stop_in_chunks(ids, stops, text, chunk, minimum) for chunk in (1, 2, 5, 8, 40)}
            assert len(found) == 1
            texts = [text(ids[:count]) for count in range(len(ids) + 1)]
            first = next((n for n, shown in enumerate(texts) if any(stop in shown for stop in stops)), None)
            stop = found.pop()
            if minimum == 0:
                assert (None if stop is None else stop[0]) == first
            elif first is not None and first > minimum:
                assert stop is not None
                assert stop[0] == first


def test_a_shard_whose_table_is_full_does_not_hold_back_one_that_has_nothing_to_draw():
    prompts, requests = [[5, 6], [7, 8], [9, 10], [11, 12]], requests_for(range(4), 1, 3)
    sampling = SamplingParams(max_completion_length=3, eos_ids=(1,))
    shards = [[[0], [1]], [[2], [3]]]  # two prompts a shard, and one row of the table
    schedule = Schedule(sampling, None, 0, 2, 1, 16, 1, 2)
    schedule.add(prompts, requests, shards)
    schedule.set_slots(2)
    assert schedule.num_to_prefill(1)
    assert schedule.admit(1)[1].tolist() == [[[0]], [[0]]]
    assert not schedule.num_to_prefill(1)
    # A step in which request 0 of the first shard goes on and request 2 of the second one ends.
    numbers = np.array([[0.5, 0.5]])
    columns = Columns(np.array([[0, 2]]), np.array([[4, 1]]), numbers, numbers, *[np.zeros((1, 2, 0))] * 2)
    report = ChunkReport(columns, np.array(1), np.array([0, -1]), np.array([1, 1]), np.array([1, 1]))
    assert [number for number, _ in schedule.read(report)] == [2]
    assert schedule.num_to_prefill(1)
    (tokens, _, group_ids, _), places = schedule.admit(1)
    assert places.tolist() == [[[1]], [[0]]], "nothing new in the first shard"
    assert (tokens[1, 0], group_ids[:, 0].tolist()) == (11, [-1, 3])
    assert not schedule.num_to_prefill(1)


def test_a_long_prompt_takes_rows_of_the_table_and_short_ones_one_each():
    """Rows of 4 positions, 3 for the longest; 2 rows of 12 positions are prefilled at a time into a table of 5."""
    lengths = (3, 13, 6, 2, 9)
    prompts = [[10 * n + i for i in range(length)] for n, length in enumerate(lengths)]
    requests = requests_for(range(5), 2, 3)
    sampling = SamplingParams(max_completion_length=3, eos_ids=(1,))
    shards = [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]]
    schedule = Schedule(sampling, None, 0, 1, 5, 4, 3, 4)
    schedule.add(prompts, requests, shards)
    schedule.set_slots(4)
    (tokens, positions, group_ids, _), places = schedule.admit(2)
    assert places.tolist() == [[[0, 5, 5], [1, 2, 3]]], "the third prompt needs two rows, and one is left"
    assert group_ids.tolist() == [[0, 0, *[-1] * 10], [1] * 12]
    assert tokens[1].tolist() == prompts[1][:-1]
    assert positions[1].tolist() == list(range(12))
    waiting, count = schedule.waiting()
    assert count.tolist() == [4]
    assert waiting.prefix_rows.tolist() == [[[0, -1, -1], [0, -1, -1], [1, 2, 3], [1, 2, 3]]]

    # Both completions of the long prompt end, and its rows are free.
    numbers, empty = np.full((1, 4), 0.5), np.zeros((1, 4, 0))
    columns = Columns(np.array([[0, 1, 2, 3]]), np.array([[4, 4, 1, 1]]), numbers, numbers, empty, empty)
    report = ChunkReport(columns, np.array(1), np.array([0, 1, -1, -1]), np.array([1, 1, 1, 1]), np.array([4]))
    assert [number for number, _ in schedule.read(report)] == [2, 3]
    assert schedule.num_to_prefill(2)
    (_, _, group_ids, _), places = schedule.admit(2)
    assert places.tolist() == [[[1, 2, 3], [5, 5, 5]]], "two prompts in one row, the first of them in two parts"
    assert group_ids.tolist() == [[*[2] * 5, *[-1] * 3, 3, *[-1] * 3], [-1] * 12]


@pytest.mark.parametrize(
    ("lengths", "table_length", "rows_per_prompt"),
    [
        ([191] * 8, 192, 1),
        ([150, 160, 191], 192, 1),  # halves save nothing
        ([63] * 8, 64, 1),
        ([100] * 63 + [2000], 128, 16),  # of 2048, 1024, ... positions each
        ([20] * 63 + [2000], 32, 63),
        ([32, 64, 96, 128, 160, 192], 96, 2),
        ([8, 9, 10], 16, 1),
        ([0], 16, 1),
    ],
)
def test_rows_of_the_prompt_table_have_the_length_in_which_prompts_take_least(lengths, table_length, rows_per_prompt):
    expected = ExpectedPrompts((), tuple(lengths))
    assert (expected.table_length, expected.rows_per_prompt) == (table_length, rows_per_prompt)


def test_one_long_prompt_costs_what_it_holds():
    """Of 64 prompts of 100 tokens one has 2,000: what a step attends to is about what all hold, not 64 times 2,000."""
    expected = ExpectedPrompts((), (100,) * 63 + (2000,))
    demand = ShardRequests.of(deal(requests_for(range(64), 8, 128), 1))
    shape = first_shape(1, demand, expected, 128, None, None)
    held = sum(expected.lengths)
    assert shape.num_slots == 256, "the slots of 32 prompts: 48 lie in the table at a time, and one more"
    assert shape.table_rows * shape.table_length < 1.5 * held
    assert shape.num_readers == 8
    assert shape.prefill_rows * shape.prefill_length <= shape.table_rows * shape.table_length
    alike = first_shape(1, demand, ExpectedPrompts((), (100,) * 64), 128, None, None)
    assert alike.table_rows * alike.table_length < 1.5 * 49 * 100
    example = first_shape(1, demand, expected, 128, 64, None)  # that of the module's docstring
    assert (example.table_length, example.rows_per_prompt, demand.prompts_at_once(64)) == (128, 16, 13)
    assert (example.table_rows, example.prefill_rows, example.num_readers, example.length) == (24, 1, 8, 64)


def test_penalties_take_the_tokens_of_waiting_prompts_and_nothing_as_long_as_the_vocabulary():
    prompts, requests = [[5, 6, 7], [5, 6, 8, 9, 8]], requests_for(range(2), 1, 3)
    tokens = {}
    for penalty in (1.0, 1.2):
        sampling = SamplingParams(max_completion_length=3, eos_ids=(), repetition_penalty=penalty)
        schedule = Schedule(sampling, None, 2, 1, 2, 4, 1, 2, counted_length=7)
        schedule.add(prompts, requests, [[[0], [1]]])
        schedule.set_slots(1)
        schedule.admit(2)
        waiting, _ = schedule.waiting()
        tokens[penalty] = waiting.prompt_tokens
    assert tokens[1.0] is None
    # Two tokens of the common prefix, four positions of the table, and the last token, which is in neither.
    assert tokens[1.2].tolist() == [[[5, 6, 7, -1, -1, -1, -1], [5, 6, 8, 9, 8, -1, -1]]]
