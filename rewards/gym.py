"""Reward: the scorers of reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.contract import elementwise
from rewards.extras import import_extra, needs_library
from rewards.settings import Settings, flag
from rewards.text import after_thinking, completion_text, tagged

# Measured with reasoning-gym 0.1.25, see `reasoning_gym`.
_TASKS = """
    ab acre advanced_geometry aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher
    chain_sum circuit_logic codeio color_cube_rotation count_bits count_primes course_schedule cryptarithm
    decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font fraction_simplification
    futoshiki gcd group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves
    largest_island lcm leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix
    maze mini_sudoku modulo_grid needle_haystack number_filtering number_format number_sequence
    palindrome_generation palindrome_partitioning path_star polynomial_equations pool_matrix power_function products
    quantum_lock ransom_note rectangle_count rotate_matrix rotten_oranges self_reference sentence_reordering
    shortest_path simple_equations simple_geometry sokoban spell_backward string_manipulation string_splitting
    string_synthesis sudoku survo syllogism tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting
    zebra_puzzles
"""
TASKS = frozenset(_TASKS.split())

_SETTINGS = Settings(partial=flag)


@elementwise
@_SETTINGS.mark
@needs_library("reasoning_gym", "reasoning-gym")
def reasoning_gym(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any] | str],
    partial: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 where the task's own scorer gives the completion 1, else 0.0; None for an empty `answer`.

    The answer is the last `<answer>...</answer>` behind the last `</think>`, as reasoning-gym's prompts ask for it, or
    else all of that text.

    answer, metadata: the columns of `data.source=reasoning_gym:TASK`; metadata may be JSON. partial: the scorer's own
    number instead, in [0, 1]; many scorers give 0.01 to anything, or a share for an answer with other text around it.
    Raises ValueError for metadata without the name of its task (`source_dataset`), and for a task that is not in
    `TASKS`: those whose scorer gives 1 to the task's own answer after a round trip through JSON, and neither 1 nor an
    error to junk and answers of other rows, and that does not run text of a row or a completion as code.
    """
    _SETTINGS.check(partial=partial)
    judged: list[float | None] = []
    for completion, gold, entry in zip(completions, answer, metadata, strict=True):
        about = json.loads(entry) if isinstance(entry, str) else entry
        task = about.get("source_dataset") if isinstance(about, Mapping) else None
        if task is None:
            raise ValueError(f"metadata must hold source_dataset, the name of a reasoning-gym task, got {about!r}")
        if task not in TASKS:
            raise ValueError(
                f"reasoning_gym cannot judge the task {task!r}: its scorer refuses the task's own answer, takes junk "
                f"for right, fails on it, or runs it as code; tasks it can judge: {sorted(TASKS)}"
            )
        if gold is None or not str(gold).strip():
            judged.append(None)
            continue
        text = after_thinking(completion_text(completion))
        tags = tagged(text, "answer")
        score = float(_scorer(task)((tags[-1] if tags else text).strip(), {"answer": gold, "metadata": about}))
        judged.append(score if partial else float(score >= 1))
    return judged


@functools.lru_cache(maxsize=16)
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    module = import_extra("reasoning_gym", "reasoning-gym", "reasoning_gym")
    return module.get_score_answer_fn(task)
