"""`check_segments`: each prompt and each branch in one piece, the prompt first, positions without gaps."""

import numpy as np
import pytest

from rl.models.inputs import Inputs, check_segments, empty_inputs, plain_inputs

PROMPT, BRANCH, NEXT = [(0, 0, 0), (1, 0, 0)], [(2, 0, 1), (3, 0, 1)], [(0, 1, 0), (1, 1, 2)]
PADDING = [(0, -1, 0), (0, -1, 0)]


def row_of(labels) -> Inputs:
    """A row of (position, group, branch)."""
    positions_BT, groups_BT, branches_BT = np.array(labels, np.int32).T[:, None]
    return Inputs(np.zeros_like(positions_BT), positions_BT, groups_BT, branches_BT)


@pytest.mark.parametrize(
    "labels",
    [
        [*PROMPT, *BRANCH, (2, 0, 5), *NEXT, *PADDING],
        [*PROMPT, *PADDING, *NEXT],
        [*PROMPT, *NEXT, *BRANCH],
        [*BRANCH],  # its prompt is in a cache
        [(7, 0, 0), (8, 0, 0), (7, 1, 0)],  # behind a prefix that all prompts have in common
    ],
)
def test_rows_in_order_are_taken(labels):
    check_segments(row_of(labels))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([*PROMPT, *BRANCH, (2, 0, 0)], "in one piece"),
        ([*PROMPT, BRANCH[0], *PADDING, BRANCH[1]], "in one piece"),
        ([*BRANCH, *PROMPT], "before its branches"),
        ([(0, 0, 0), (2, 0, 0)], "grow by one"),
        ([(1, 0, 0), (0, 0, 0)], "grow by one"),
        ([*PROMPT, (3, 0, 1)], "go on from its prompt"),
        ([*PROMPT, (1, 0, 1)], "go on from its prompt"),
    ],
)
def test_rows_out_of_order_are_not(labels, problem):
    with pytest.raises(AssertionError, match=problem):
        check_segments(row_of(labels))


def test_plain_and_empty_rows_are_in_order():
    plain, empty = plain_inputs(np.array([[5, 7, 5], [1, 1, 2]], np.int32)), empty_inputs(2, 3)
    assert plain.positions_BT.tolist() == [[0, 1, 2]] * 2
    assert (empty.group_ids_BT == -1).all()
    for inputs in (plain, empty):
        assert {x.shape for x in inputs} == {(2, 3)}
        assert {x.dtype for x in inputs} == {np.dtype(np.int32)}
        check_segments(inputs)
