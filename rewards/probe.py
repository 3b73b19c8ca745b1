"""The completions with which the start-up check tries a batch function: one call with all against calls with one each.

In: data rows. Out: probes, each with two groups of completions, of two rows where there are two. The first probe holds
right and wrong answers in the usual formats, short and long, equal completions, an empty one and a long one, so that a
function that compares completions has something to compare. The second is for functions that see nothing in the first.
It holds other formats, the words of the row, and words that rewards often look for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rewards.batch import FAILURES, RewardResult
from rewards.text import boxed

_LONG = 2000  # characters
_REASONING = "Let us see. "
# Usual names of the column with the right answer, the likeliest first.
_GOLD_NAMES = (
    *("answer", "final_answer", "ground_truth", "gold", "solution", "expected_answer", "correct_answer", "target"),
    *("label", "labels", "expected", "reference", "output", "response", "result", "completion", "chosen"),
)
_WORDS = (
    "please Please, thank you. Sure! Sorry? Yes, no. First, second, then; next, finally, because, therefore, so: "
    "however, wait, hmm, let me think step by step, check, maybe. I am happy to help, hello, good, great, love :) "
    "the a an and is not 0 1 2 3 4 5 6 7 8 9 http://example.com"
)


class Probe(NamedTuple):
    """Two groups of completions, as the arguments of `rewards.runner.RewardRunner.score`. The token ids are bytes."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]
    completion_ids: list[list[int]]
    group_size: int


class Trial(NamedTuple):
    """What a function made of the completions that it was tried with.

    num_completions, num_failed: how many there were, and on how many it failed. failure: the first one, in words.
    rewards: those that it gave, each once.
    """

    num_completions: int
    num_failed: int
    failure: str
    rewards: frozenset[float]

    def with_result(self, name: str, rewards: Sequence[float | None], result: RewardResult) -> "Trial":
        """With those of one more result, whose rewards of this function are given."""
        return Trial(
            self.num_completions + len(rewards),
            self.num_failed + sum(result.counts[name][kind] for kind in FAILURES),
            self.failure or next(iter(result.failures.get(name, {}).values()), ""),
            self.rewards | {reward for reward in rewards if reward is not None},
        )


def probes(rows: Sequence[tuple[Any, Mapping[str, Any]]], columns: Sequence[str]) -> list[Probe]:
    """The two probes. rows: prompt and columns of at least one data row; columns: the names of all columns."""
    first = rows[0]
    second = next((row for row in rows if row[0] != first[0]), first)
    made = []
    for texts_of in (_usual_texts, _other_texts):
        texts = [texts_of(first, second), texts_of(second, first)[::-1]]
        row_of = [row for row, group in zip((first, second), texts, strict=True) for _ in group]
        flat = [text for group in texts for text in group]
        probe = Probe(
            prompts=[prompt for prompt, _ in row_of],
            completions=[
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for (prompt, _), text in zip(row_of, flat, strict=True)
            ],
            columns={name: [values.get(name) for _, values in row_of] for name in columns},
            completion_ids=[list(text.encode()) for text in flat],
            group_size=len(texts[0]),
        )
        made.append(probe)
    return made


def answer_forms(answer: str) -> dict[str, str]:
    """A right answer as completions in the formats that functions usually look for, {name of the format: text}."""
    final = _final(answer)
    return {
        "as in the row": answer,
        "stated": f"{_REASONING}The answer is {final}.\n#### {final}",
        "boxed": f"{_REASONING}\\boxed{{{final}}}",
        "in tags": f"<think>\n{_REASONING}\n</think>\n<answer>\n{final}\n</answer>",
    }


def long_text(num_characters: int) -> str:
    """Reasoning of at least that many characters, without an answer."""
    return _REASONING * (num_characters // len(_REASONING) + 1)


def shows_how_it_judges(probe: Probe, rewards: Sequence[float | None]) -> bool:
    """Whether the rewards could show that a function compares completions: two completions of one group got more than
    the lowest reward.

    A single one shows nothing, because it wins both alone and among all. None counts as lower than any reward.
    """
    values = [float("-inf") if reward is None else reward for reward in rewards]
    lowest = min(values)
    for start in range(0, len(values), probe.group_size):
        group = range(start, start + probe.group_size)
        if sum(values[b] > lowest for b in group) > 1:
            return True
    return False


def _gold(row: tuple[Any, Mapping[str, Any]]) -> str:
    """The right answer in the row, or its prompt if there is none."""
    named = {name.lower(): value for name, value in _leaves(row[1])}
    for name in _GOLD_NAMES:
        if named.get(name) not in (None, ""):
            return _text(named[name])
    return _text(next((value for value in named.values() if value not in (None, "")), prompt_text(row[0])))


def prompt_text(prompt: Any) -> str:
    """A prompt as text: for a chat, its last message."""
    is_chat = isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[-1], Mapping)
    return _text(prompt[-1].get("content") if is_chat else prompt)


def _leaves(columns: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the columns, and of the entries of columns that are mappings or lists of one value."""
    for name, value in columns.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        elif isinstance(value, (list, tuple)):
            if value and not isinstance(value[0], (Mapping, list, tuple)):
                yield name, value[0]
        else:
            yield name, value


def _text(value: Any) -> str:
    return str(value).encode(errors="replace").decode()[:_LONG]


def _final(gold: str) -> str:
    """The answer at the end of a worked solution: after "####" (GSM8K), in \\boxed{}, else all of it."""
    if "####" in gold:
        return gold.rpartition("####")[2].strip()
    in_box = [inside for inside in boxed(gold) if inside is not None]
    if in_box:
        return in_box[-1]
    tag = re.search(r"<answer>(.*?)</answer>", gold, re.DOTALL)
    return tag[1].strip() if tag else gold


def _usual_texts(row: tuple[Any, Mapping[str, Any]], other_row: tuple[Any, Mapping[str, Any]]) -> list[str]:
    whole, answer, other = _gold(row), _final(_gold(row)), _final(_gold(other_row))
    return [
        whole,
        f"{_REASONING}The answer is {answer}.",
        "",
        f"\\boxed{{{answer}}}",
        whole,
        f" {answer}\n",
        f"{answer} is right.",
        f"{other} or 7 or x",
        _REASONING * (_LONG // len(_REASONING)) + answer,
        f"{_REASONING}It is \\boxed{{{answer}}}.\n#### {answer}",
        f"<think>{_REASONING}It is {other}.</think>\n<answer>{answer}</answer>\n#### {answer}",
        f"<think>{_REASONING}</think>\n<answer>{answer}</answer>",
    ]


def _other_texts(row: tuple[Any, Mapping[str, Any]], other_row: tuple[Any, Mapping[str, Any]]) -> list[str]:
    answer, other = _final(_gold(row)), _final(_gold(other_row))
    prompt = prompt_text(row[0])
    values = " ".join(_text(value) for _, value in _leaves(row[1]))
    quoted = answer.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    as_json = f'{{"answer": "{quoted}"}}'
    lines = "\n".join(f"{number}. {_REASONING}" for number in range(1, 4))
    return [
        "",
        as_json,
        f'{{"reasoning": "{_REASONING}", "answer": "{quoted}"}}',
        f"{_REASONING}\n```json\n{as_json}\n```",
        f'```python\nprint("{quoted}")\n```',
        f'{_REASONING}\n```python\n# {_REASONING}\nprint("{quoted}")\n```\n',
        f"<reasoning>\n{_REASONING}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
        f"<reasoning>\n{_REASONING * 2}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
        f"<think>\n{_REASONING}\n</think>\n<answer>\n{answer}\n</answer>",
        f"<think>\n{_REASONING * 2}\n</think>\n<answer>\n{answer}\n</answer>",
        f"**{answer}**",
        f"# {_REASONING}\n\n{lines}\n\n- **Final Answer:** **{answer}**",
        f"Final Answer: The final answer is ${answer}$. I hope it is correct.",
        f"Answer: {answer}",
        f"{_REASONING}\n\nAnswer: {answer}",
        f"<SOLUTION>{answer}</SOLUTION>",
        f"<solution>{answer}</solution> <SOLUTION>{_REASONING}{answer}</SOLUTION>",
        prompt,
        f"{prompt} {values}",
        f"{values} {other}",
        f"{_WORDS} {answer}",
        f"{_WORDS.lower()} {_REASONING}",
        f"{_WORDS} {answer} {prompt}".upper(),
        f"{_REASONING}{_WORDS}".upper(),
    ]
