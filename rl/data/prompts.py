"""The rows of a run: which are trained on, and which are held out.

In: a configuration and a tokenizer. Out: tokenized rows. Everything is a pure function of the configuration: no global
random state, the same rows in every process. Train and held-out rows never share a question. `rl.data.sources` reads
the rows, `rl.data.prompt_rows` makes prompts of them, `rl.data.order` says which of them a step takes. Processes
communicate through jax, which is imported only to read.

Legend: P prompts, T token positions.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rl.config.load import Config, require
from rl.config.sections import DataSection, EvalSection
from rl.data.held_out import load_eval_source, share_of, smallest_hashes, without_overlap
from rl.data.prompt_rows import (
    Prompt,
    PromptRow,
    encode_prompt,
    encode_together,
    load_source,
    question_key,
    tokenize,
    with_examples,
)
from rl.data.sources import SourceRows, list_columns
from rl.data.stream import PromptStream, open_stream
from rl.data.tokenizer import Tokenizer, split_prefill
from rl.files.json_file import shown

# Of environments that make their prompts: prompts of a run, and rows that stand for them.
_MOST_PROMPTS, _MOST_ROWS = 2**31, 2**16
# What an entry of data.sources may say in place of the section.
_OF_ENTRY = (
    *("columns", "prepare", "answer_from_messages", "system_prompt", "assistant_prefill", "eval_share"),
    *("chat_template_kwargs", "few_shot"),
)


@dataclasses.dataclass(frozen=True)
class PromptData:
    """Train and held-out rows.

    Attributes:
      num_rows: rows that were read, without those that filters left out. num_dropped: prompts that were too long.
      messages: what was left out, in words.
      sizes: the number of training rows of each source of a mixture, which stand in the order of the sources.
      stream: the training rows of a source that is read while the run goes on, with data.streaming. `train` are then
        those of its first block, and the numbers of rows cover that block only.
      are_made_up: whether there are no data, and the rows stand for prompts that an environment makes.
      sets: the rows of each set of `eval.sets`, where they are read (`rl.data.eval_sets`).
    """

    train: list[PromptRow]
    held_out: list[PromptRow]
    num_rows: int
    num_dropped: int
    messages: list[str]
    sizes: Sequence[int] = ()
    stream: PromptStream | None = None
    are_made_up: bool = False
    sets: Mapping[str, list[PromptRow]] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> "PromptStream | list[PromptRow]":
        """The training rows by the numbers that the run's order (`rl.data.order`) gives."""
        return self.train if self.stream is None else self.stream

    @property
    def longest_prompt(self) -> int:
        """The number of tokens of the longest training prompt; of a stream the most that there may be."""
        return max(len(row.prompt_ids) for row in self.train) if self.stream is None else self.stream.longest_prompt

    @property
    def num_positions(self) -> int:
        """By how much the position in the data grows in an epoch, where a checkpoint splits it."""
        if self.are_made_up:  # their number follows from grpo.steps, which may change
            return _MOST_PROMPTS
        return len(self.train) if self.stream is None else self.stream.num_positions

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the training rows: `fingerprint` of all of them, or of what a stream reads them from."""
        of_train = fingerprint([] if self.are_made_up else self.train)
        return of_train if self.stream is None else self.stream.fingerprint(of_train["hash"])

    @property
    def evaluated_rows(self) -> list[PromptRow]:
        """The held-out rows, and those of the sets."""
        return [row for rows in (self.held_out, *self.sets.values()) for row in rows]

    @property
    def judged_rows(self) -> list[PromptRow]:
        """The training rows, and those of the sets, whose columns reward functions may use too."""
        return [row for rows in (self.train, *self.sets.values()) for row in rows]

    def evaluated(self, section: EvalSection) -> list[PromptRow]:
        """The held-out rows that evaluations during training ask; none where there are no evaluations."""
        return evaluated_rows(self.held_out, section.max_prompts) if section.every else []


def evaluated_rows(held_out: list[PromptRow], max_prompts: int | None) -> list[PromptRow]:
    """The held-out rows that an evaluation asks, in their order: all, or at most `max_prompts`, which the sources of a
    mixture give by turns.
    """
    if max_prompts is None or max_prompts >= len(held_out):
        return held_out
    turns: dict[int, int] = {}  # {source: how many of its rows stand before}
    ranks = []
    for place, row in enumerate(held_out):
        turns[row.source] = turns.get(row.source, -1) + 1
        ranks.append((turns[row.source], row.source, place))
    return [held_out[place] for place in sorted(place for *_, place in sorted(ranks)[:max_prompts])]


@dataclasses.dataclass(frozen=True)
class PairRow:
    """One example to imitate: int32 ids of the prompt [T] and of the completion [T], which ends with EOS."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairData:
    """Rows for supervised fine-tuning, and the held-out prompts of the same split; `num_dropped` counts prompts and
    completions over their limits. `sizes`: see `PromptData`.
    """

    rows: list[PairRow]
    held_out: list[PromptRow]
    num_dropped: int
    messages: list[str]
    sizes: Sequence[int] = ()


def load_prompts(config: Config, tokenizer: Tokenizer) -> PromptData:
    """Tokenized prompts, split into train and held-out rows by the question's text.

    Without data.eval_source, data.eval_size distinct questions are held out: those with the smallest hash of (seed,
    question), one row each. With the same seed and size, a run on a part of a source holds out every question of that
    part which a run on the whole source holds out. So supervised fine-tuning on a part never trains on questions on
    which GRPO on all of it is evaluated. With data.eval_share, the questions are held out whose hash, as a number in
    0..1, is below it: whether a question is held out does not depend on the others. With data.eval_source, all its rows
    are held out, and train rows with the same question are removed. Questions are compared without case and spacing.

    Raises:
      ValueError: no row is left, a prompt is neither text nor messages, or a chat prompt has no chat template; or
        another process has another configuration, tokenizer or size of a source.
    """
    from rl.devices import hosts

    if hosts.num_processes() > 1:
        hosts.check_same(config, {"the tokenizer": tokenizer.content_hash()})
    data = config.data
    if config.is_without_data:
        return _made_up(config, tokenizer)
    if not data.sources:
        require(data.source, "data.source", "train.jsonl")
    messages: list[str] = []
    if data.streaming:
        stream, (held_out, asked) = open_stream(config, tokenizer, messages)
        num_rows, num_dropped = stream.counts[0]
        num_rows += len(asked)
        num_dropped += len(asked) - len(held_out) if asked else 0
        return PromptData(stream.block(0), held_out, num_rows, num_dropped, messages, stream=stream)
    seen: dict[str, str] = {}  # {question: the row that has it first}, for data.remove_duplicates
    chosen: set[str] = set()  # questions that are held out
    candidates: list[PromptRow] = []
    held_out: list[PromptRow] = []
    questions: dict[tuple[int, int], str] = {}  # {(source, index): question} of every row
    num_rows = 0
    for number, (key, section) in enumerate(sections_of(data)):
        section = with_examples(section, key)
        read = load_source(section, config, key, messages)
        if data.remove_duplicates:
            read = _first_of_each(read, key, seen, messages)
        if not read.rows:
            continue
        if data.sources:  # verl's name for it; a column of the data set wins
            named = [{"data_source": data.source_names[number], **row} for row in read.rows]
            read = dataclasses.replace(read, rows=named)
        rows = tokenize(read, section, tokenizer, key, messages, number)
        questions |= {(number, row.index): question_key(read.rows[row.index]["prompt"]) for row in rows}
        num_rows += len(read.rows)
        candidates += rows
        if section.eval_size:
            of_source = {questions[row.source, row.index] for row in rows}
            chosen |= smallest_hashes(of_source, config.seed, section.eval_size, _key_of(data, number, "eval_size"))
        if section.eval_share:
            of_source = {questions[row.source, row.index] for row in rows}
            chosen |= share_of(of_source, config.seed, section.eval_share, _key_of(data, number, "eval_share"))
    if not candidates:
        raise ValueError(
            "data.source must hold a row that is none of the examples of data.few_shot, got none; leave examples out"
        )
    num_dropped = num_rows - len(candidates)
    if data.eval_source is None:
        first_rows: dict[str, PromptRow] = {}
        for row in candidates:
            if questions[row.source, row.index] in chosen:
                first_rows.setdefault(questions[row.source, row.index], row)
        held_out = list(first_rows.values())
    else:
        held_out, asked = load_eval_source(config, tokenizer, messages)
        num_rows += len(asked)
        num_dropped += len(asked) - len(held_out)
        chosen = {*asked}
        questions |= {(-1, row.index): asked[row.index] for row in held_out}
    train = [row for row in candidates if questions[row.source, row.index] not in chosen]
    if not train:
        raise ValueError(
            f"data.source must hold a question that data.eval_source does not, got {len(candidates)} rows, all held out"
        )
    if data.eval_source is not None and len(train) < len(candidates):
        messages.append(
            f"removed {len(candidates) - len(train)} of {len(candidates)} training rows whose question is held out in "
            "data.eval_source"
        )
    own, others = ([questions[row.source, row.index] for row in rows] for rows in (train, held_out))
    train = without_overlap(train, held_out, own, others, data.remove_overlap, messages)
    sizes = [sum(row.source == number for row in train) for number in range(len(data.sources))]
    if 0 in sizes:
        name = data.source_names[sizes.index(0)]
        raise ValueError(f"data.sources: {name!r} must hold a row to train on, got none that is left; take it out")
    return PromptData(train, held_out, num_rows, num_dropped, messages, sizes)


def _made_up(config: Config, tokenizer: Tokenizer) -> PromptData:
    """Rows without columns, for an environment that makes its prompts from its seed. Their prompt is an empty question,
    behind the system prompt where there is one. There are as many as the steps of the run may take, but at most
    `_MOST_ROWS`, which are all alike and come again then; and data.eval_size held-out ones.
    """
    data, grpo = config.data, config.grpo
    tokenizer = tokenizer.with_template_kwargs(data.chat_template_kwargs)
    prompt: Prompt = data.system_prompt or ""
    if data.chat:
        system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
        prompt = [*system, {"role": "user", "content": ""}]
    ids = np.asarray(encode_prompt(prompt, tokenizer, "the empty question"), np.int32)
    of_step = grpo.prompts_per_step * (1 + grpo.dynamic_sampling_rounds)
    num_rows = max(of_step, min(grpo.steps * of_step, _MOST_ROWS))
    train = [PromptRow(prompt, ids, {}, index, f"prompt {index}") for index in range(num_rows)]
    held_out = [PromptRow(prompt, ids, {}, index, f"held-out prompt {index}", -1) for index in range(data.eval_size)]
    return PromptData(train, held_out, num_rows + len(held_out), 0, [], are_made_up=True)


def sections_of(data: DataSection) -> list[tuple[str, DataSection]]:
    """(key, section) of data.source, or of each source of a mixture with what its entry says in place of the
    section's own values.
    """
    if not data.sources:
        return [("data.source", data)]
    return [
        (
            f"data.sources {name!r}",
            dataclasses.replace(
                data,
                source=entry.source,
                args=entry.args,
                eval_size=entry.eval_size,
                **{key: value for key in _OF_ENTRY if (value := getattr(entry, key)) is not None},
            ),
        )
        for name, entry in zip(data.source_names, data.sources, strict=True)
    ]


def _key_of(data: DataSection, number: int, name: str) -> str:
    return f"data.sources.{number}.{name}" if data.sources and getattr(data.sources[number], name) else f"data.{name}"


def _first_of_each(read: SourceRows, key: str, seen: dict[str, str], messages: list[str]) -> SourceRows:
    """The rows whose question no row had before. `seen` is added to, and holds those of earlier sources."""
    kept, example = [], ""
    for index, row in enumerate(read.rows):
        question, place = question_key(row["prompt"]), f"{key} {read.where(index)}"
        if question not in seen:
            seen[question] = place
            kept.append(index)
        elif not example:
            example = f"{place} is that of {seen[question]}"
    if len(kept) < len(read.rows):
        messages.append(
            f"removed {len(read.rows) - len(kept)} of {len(read.rows)} rows of {key} whose question a row before them "
            f"has: {example}"
        )
    return read.kept(kept)


def load_pairs(config: Config, tokenizer: Tokenizer) -> PairData:
    """Rows for supervised fine-tuning, from the train side of the same split as `load_prompts`.

    The completion is the column sft.completion_column, with the tokenizer's EOS at its end.

    Raises:
      ValueError: as in `load_prompts`; or the column is missing or not text, the tokenizer has no EOS, or every
        completion is too long.
    """
    if not tokenizer.eos_ids:
        raise ValueError(
            "the tokenizer must have an EOS token for supervised fine-tuning, got none; set eos_token in its "
            "tokenizer_config.json"
        )
    if not config.data.sources:
        require(config.data.source, "data.source", "train.jsonl")
    if config.data.streaming:
        raise ValueError(
            "data.streaming must be false for supervised fine-tuning, whose rows are all in memory, got true; it is "
            "for grpo train"
        )
    split = load_prompts(config, tokenizer)
    column, limit = config.sft.completion_column, config.sft.max_completion_length
    tokenizers = [tokenizer.with_template_kwargs(own.chat_template_kwargs) for _, own in sections_of(config.data)]

    def encode(index: int) -> list[int]:
        row = split.train[index]
        return [*_completion_ids(row, column, tokenizers[row.source]), tokenizer.eos_ids[0]]

    completions, shortest = encode_together(len(split.train), encode, limit)
    fits = [(row, ids) for row, ids in zip(split.train, completions, strict=True) if ids is not None]
    pairs = [PairRow(row.prompt_ids, ids) for row, ids in fits]
    if not pairs:
        raise ValueError(
            f"sft.max_completion_length must let a completion through, got {limit}; the shortest has "
            f"{shortest} tokens with EOS"
        )
    num_long = len(split.train) - len(pairs)
    messages = list(split.messages)
    if num_long:
        messages.append(
            f"dropped {num_long} of {len(split.train)} completions longer than sft.max_completion_length={limit} tokens"
        )
    sizes = [sum(row.source == number for row, _ in fits) for number in range(len(split.sizes))]
    return PairData(pairs, split.held_out, split.num_dropped + num_long, messages, sizes)


def fingerprint(rows: Iterable[PromptRow] | Iterable[PairRow]) -> dict[str, Any]:
    """Number and hash of tokenized rows in their order, because a resumed run must see the same rows."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        completion = (
            row.completion_ids.tobytes() if isinstance(row, PairRow) else repr(sorted(row.columns.items())).encode()
        )
        digest.update(b"%d %d " % (row.prompt_ids.nbytes, len(completion)) + row.prompt_ids.tobytes() + completion)
        count += 1
    return {"rows": count, "hash": digest.hexdigest()}


def held_out_fingerprint(rows: Sequence[PromptRow]) -> dict[str, Any]:
    """`fingerprint` of the held-out rows, and a hash of their questions alone. While the questions are the same, no
    training row is among them.
    """
    questions = sorted({question_key(row.prompt) for row in rows})
    text = "".join(f"{len(question)} {question}" for question in questions)
    return {**fingerprint(rows), "questions": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


def check_enough_rows(num_rows: int, prompts_per_step: int, key: str = "grpo.prompts_per_step") -> None:
    """ValueError when one step would need more distinct rows than there are; `key` names the setting."""
    if prompts_per_step > num_rows:
        raise ValueError(
            f"{key} must be <= the number of training rows, got {prompts_per_step} for {num_rows} rows; lower {key} or "
            "add data"
        )


def _completion_ids(row: PromptRow, column: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the completion as a continuation of the prompt's ids, without EOS."""
    if column not in row.columns:
        raise ValueError(
            f"sft.completion_column must name a column of the data, got {shown(column)}"
            f"{list_columns(column, row.columns)}"
        )
    completion = row.columns[column]
    if isinstance(completion, int) and not isinstance(completion, bool):
        completion = str(completion)
    if not isinstance(completion, str):
        raise ValueError(
            f"{row.where}: sft.completion_column {column!r} must hold text or whole numbers, got {completion!r}"
        )
    begun = "" if isinstance(row.prompt, str) else split_prefill(row.prompt)[1]
    if begun and completion.startswith(begun):
        raise ValueError(
            f"{row.where}: {column!r} must go on from the beginning that its prompt gives, "
            f"{shown(begun)}, and starts with it again; set data.assistant_prefill=null, or take it off the answers"
        )
    # Encoded after its prompt, because some tokenizers put a space in front of text that stands alone. If the border
    # falls inside a token, the completion is encoded alone, because generation starts from the prompt's own ids.
    if isinstance(row.prompt, str):
        whole = tokenizer.encode(row.prompt + completion)
    else:
        whole = tokenizer.encode(tokenizer.render_chat(row.prompt) + completion, add_bos=False)
    num_prompt = len(row.prompt_ids)
    if whole[:num_prompt] == row.prompt_ids.tolist():
        return whole[num_prompt:]
    return tokenizer.encode(completion, add_bos=False)
