"""The inputs of a policy: tokens, and the labels that say which tokens a token sees.

Legend: B rows, T token positions, R rows of all batches together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PADDING_GROUP = -1


class Inputs(NamedTuple):
    """Rows of tokens with their labels, each int32 [B, T]; numpy or JAX arrays, shapes or shardings.

    A token sees the earlier positions of its own group that are in branch 0 (the prompt) or in its own branch. A
    *segment* is the tokens of one group and one branch. Each segment is contiguous in its row, and its positions grow
    by one. A prompt stands before its branches, whose positions go on from the prompt's: see `check_segments`.

    Attributes:
      positions_BT: the position of the token in its own sequence, from 0.
      group_ids_BT: the prompt to which the token belongs; `PADDING_GROUP` on padding.
      branch_ids_BT: 0 for a prompt, any other number for one of its completions.
    """

    tokens_BT: Any
    positions_BT: Any
    group_ids_BT: Any
    branch_ids_BT: Any

    @property
    def labels(self) -> tuple[Any, Any, Any]:
        """The labels without the tokens, by which `rl.models.ops.visible` decides."""
        return self.positions_BT, self.group_ids_BT, self.branch_ids_BT


def plain_inputs(tokens_BT: Any) -> Inputs:
    """Each row as one whole sequence, without padding."""
    library: Any = jnp if isinstance(tokens_BT, jax.Array) else np
    positions_BT = library.broadcast_to(library.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    zeros_BT = library.zeros_like(tokens_BT)
    return Inputs(tokens_BT, positions_BT, zeros_BT, zeros_BT)


def empty_inputs(num_rows: int, length: int) -> Inputs:
    """Rows of padding, numpy int32, to be filled."""
    tokens_BT, positions_BT, group_ids_BT, branch_ids_BT = np.zeros((4, num_rows, length), np.int32)
    group_ids_BT += PADDING_GROUP
    return Inputs(tokens_BT, positions_BT, group_ids_BT, branch_ids_BT)


def check_segments(inputs: Inputs) -> None:
    """Asserts the order inside the rows that `Inputs` promises; a branch may come without its prompt.

    Args:
      inputs: numpy arrays [..., T].
    """
    positions_RT, groups_RT, branches_RT = (x.reshape(-1, x.shape[-1]) for x in inputs.labels)
    is_used_RT = groups_RT >= 0
    goes_on_RT = np.zeros_like(is_used_RT)
    goes_on_RT[:, 1:] = (groups_RT[:, 1:] == groups_RT[:, :-1]) & (branches_RT[:, 1:] == branches_RT[:, :-1])
    goes_on_RT &= is_used_RT
    steps_RT = np.diff(positions_RT, axis=1, prepend=0)
    assert np.all(steps_RT[goes_on_RT] == 1), "positions of a segment must grow by one"
    is_last_RT = is_used_RT.copy()
    is_last_RT[:, :-1] &= ~goes_on_RT[:, 1:]
    rows_S, first_S = np.nonzero(is_used_RT & ~goes_on_RT)
    _, last_S = np.nonzero(is_last_RT)  # of the same segments, in the same order
    names = np.stack([rows_S, groups_RT[rows_S, first_S], branches_RT[rows_S, first_S]], axis=-1)
    places = np.stack([first_S, positions_RT[rows_S, first_S], positions_RT[rows_S, last_S]], axis=-1)
    segments = dict(zip(map(tuple, names.tolist()), places.tolist(), strict=True))
    assert len(segments) == len(names), "a segment must be in one piece"
    for (row, group, branch), (place, position, _) in segments.items():
        prompt = segments.get((row, group, 0))
        if branch != 0 and prompt is not None:
            prompt_place, _, prompt_end = prompt
            assert prompt_place < place, "a prompt must stand before its branches"
            assert position == prompt_end + 1, "a branch must go on from its prompt"
