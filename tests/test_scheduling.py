"""Who waits where: sizes, dealing, packing, stop strings. No model."""

from collections.abc import Sequence

import numpy as np
import pytest

from rl.sampling import SamplingParams
from rl.scheduling import (
    Request,
    common_prefix_length,
    deal,
    find_stop,
    own_lengths,
    pack_rows,
    size_at_least,
    size_at_most,
    slot_sizes,
)


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


def test_slots_halve_and_lengths_double():
    assert slot_sizes(64) == [64, 32, 16, 8]
    assert slot_sizes(20) == [20, 10, 8]
    assert slot_sizes(1024) == [1024, 512, 256, 128]
    assert slot_sizes(3) == [3]
    assert own_lengths(1) == [16]
    assert own_lengths(64) == [64]
    assert own_lengths(300) == [64, 128, 256, 304]


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


def test_rows_hold_every_prompt_once_within_their_length_and_nearly_in_order():
    lengths = np.random.default_rng(0).integers(1, 50, 300).tolist()
    rows = pack_rows(lengths, 64, 4)
    assert sorted(number for row in rows for number in row) == list(range(300))
    assert all(sum(lengths[number] for number in row) <= 64 and len(row) <= 4 for row in rows)
    assert len(rows) < 1.2 * sum(lengths) / 64 + 1
    firsts = [row[0] for row in rows]
    assert firsts == sorted(firsts), "a row is opened by the next prompt that fits nowhere"
    assert pack_rows([64, 64], 64, 4) == [[0], [1]]
    assert pack_rows([0, 0, 0, 0, 0], 16, 4) == [[0, 1, 2, 3], [4]]


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

    def find(ids, stops, num_checked=0, minimum=0):
        sampling = SamplingParams(max_completion_length=24, stop_strings=stops, min_completion_length=minimum)
        return find_stop(ids, num_checked, sampling, text)

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
