"""Prompts: tokenized train and held-out rows, and the order in which steps take them.

In: a source and a tokenizer. Everything is a pure function of the configuration: no global random state, the same rows
in every process. A prompt that is too long is dropped and counted, never cut. Train and held-out rows never share a
question. `rl.data.sources` reads the rows. With several processes, each tokenizes one block of the rows and sends the
ids to the others. They communicate through jax, which is imported only to read.

Legend: P prompts, T token positions.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from rl.config.load import Config, require
from rl.config.sections import DataSection, EvalSection
from rl.data.overlap import WORDS, find_overlaps
from rl.data.sources import SourceRows, list_columns, read_rows
from rl.data.tasks import Row
from rl.data.tokenizer import Tokenizer, split_prefill
from rl.files.json_file import shown

Prompt = str | list[dict[str, Any]]
# What an entry of data.sources may say in place of the section.
_OF_ENTRY = ("columns", "prepare", "answer_from_messages", "system_prompt", "assistant_prefill", "eval_share")


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One question, ready to be sampled.

    Attributes:
      prompt: text (with the system prompt in front) or chat messages. A last message by the assistant is the beginning
        of the answer.
      prompt_ids: int32 [T], the tokenized prompt; no padding.
      columns: the other columns of the row, under Tandem's names.
      index: the position of the row in its source.
      where: the row in words, for messages: key, file and number.
      source: the number of its source in a mixture; -1 for a row of data.eval_source.
    """

    prompt: Prompt
    prompt_ids: np.ndarray
    columns: dict[str, Any]
    index: int
    where: str = ""
    source: int = 0


@dataclasses.dataclass(frozen=True)
class PromptData:
    """Train and held-out rows.

    Attributes:
      num_rows: rows that were read, without those that filters left out. num_dropped: prompts that were too long.
      messages: what was left out, in words.
      sizes: the number of training rows of each source of a mixture, which stand in the order of the sources.
    """

    train: list[PromptRow]
    held_out: list[PromptRow]
    num_rows: int
    num_dropped: int
    messages: list[str]
    sizes: Sequence[int] = ()

    @property
    def longest_prompt(self) -> int:
        """The number of tokens of the longest training prompt."""
        return max(len(row.prompt_ids) for row in self.train)

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
    if not data.sources:
        require(data.source, "data.source", "train.jsonl")
    messages: list[str] = []
    seen: dict[str, str] = {}  # {question: the row that has it first}, for data.remove_duplicates
    chosen: set[str] = set()  # questions that are held out
    candidates: list[PromptRow] = []
    held_out: list[PromptRow] = []
    questions: dict[tuple[int, int], str] = {}  # {(source, index): question} of every row
    num_rows = 0
    for number, (key, section) in enumerate(_sections(data)):
        read = _load(section, config, key, messages)
        if data.remove_duplicates:
            read = _first_of_each(read, key, seen, messages)
        if not read.rows:
            continue
        if data.sources:  # verl's name for it; a column of the data set wins
            named = [{"data_source": data.source_names[number], **row} for row in read.rows]
            read = dataclasses.replace(read, rows=named)
        rows = _tokenize(read, section, tokenizer, key, messages, number)
        questions |= {(number, row.index): question_key(read.rows[row.index]["prompt"]) for row in rows}
        num_rows += len(read.rows)
        candidates += rows
        if section.eval_size:
            of_source = {questions[row.source, row.index] for row in rows}
            chosen |= _held_out_questions(of_source, config.seed, section.eval_size, _key_of(data, number, "eval_size"))
        if section.eval_share:
            of_source = {questions[row.source, row.index] for row in rows}
            chosen |= _held_out_share(of_source, config.seed, section.eval_share, _key_of(data, number, "eval_share"))
    num_dropped = num_rows - len(candidates)
    if data.eval_source is None:
        first_rows: dict[str, PromptRow] = {}
        for row in candidates:
            if questions[row.source, row.index] in chosen:
                first_rows.setdefault(questions[row.source, row.index], row)
        held_out = list(first_rows.values())
    else:
        section = dataclasses.replace(data, source=data.eval_source, args=data.eval_args)
        read = _load(section, config, "data.eval_source", messages)
        held_out = _tokenize(read, section, tokenizer, "data.eval_source", messages, source=-1)
        num_rows += len(read.rows)
        num_dropped += len(read.rows) - len(held_out)
        chosen = {question_key(row["prompt"]) for row in read.rows}
        questions |= {(-1, row.index): question_key(read.rows[row.index]["prompt"]) for row in held_out}
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
    train = _without_overlap(train, held_out, questions, data.remove_overlap, messages)
    sizes = [sum(row.source == number for row in train) for number in range(len(data.sources))]
    if 0 in sizes:
        name = data.source_names[sizes.index(0)]
        raise ValueError(f"data.sources: {name!r} must hold a row to train on, got none that is left; take it out")
    return PromptData(train, held_out, num_rows, num_dropped, messages, sizes)


def _sections(data: DataSection) -> list[tuple[str, DataSection]]:
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


def _without_overlap(
    train: list[PromptRow],
    held_out: list[PromptRow],
    questions: Mapping[tuple[int, int], str],
    remove: bool,
    messages: list[str],
) -> list[PromptRow]:
    """The training rows, without those that share a passage with a held-out row if they are to be removed."""
    found = find_overlaps(
        [questions[row.source, row.index] for row in train], [questions[row.source, row.index] for row in held_out]
    )
    if not found:
        return train
    first = found[0]
    what = (
        f"{len(found)} of {len(train)} training rows that share {WORDS} words in a row with a held-out row, such as "
        f"{train[first.train].where} with {held_out[first.held_out].where}: {shown(first.passage)}"
    )
    if not remove:
        messages.append(f"kept {what}; data.remove_overlap=true leaves them out")
        return train
    if len(found) == len(train):
        raise ValueError(f"data.remove_overlap must leave a training row, got {what}; set data.remove_overlap=false")
    messages.append(f"removed {what}")
    gone = {overlap.train for overlap in found}
    return [row for index, row in enumerate(train) if index not in gone]


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
    split = load_prompts(config, tokenizer)
    column, limit = config.sft.completion_column, config.sft.max_completion_length

    def encode(index: int) -> list[int]:
        return [*_completion_ids(split.train[index], column, tokenizer), tokenizer.eos_ids[0]]

    completions, shortest = _encode_together(len(split.train), encode, limit)
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


def question_key(prompt: Prompt) -> str:
    """The question of a prompt, by which rows are compared: without system message and beginning of the answer, with
    case folded and spacing collapsed.
    """
    if not isinstance(prompt, str):
        asked, _ = split_prefill(prompt)
        prompt = "\n".join(message["content"] for message in asked if message["role"] != "system")
    return " ".join(prompt.casefold().split())


def build_prompt(prompt: Any, data: DataSection, where: str) -> Prompt:
    """The prompt with its system prompt: text, or chat messages with data.chat. data.assistant_prefill then becomes a
    last message by the assistant.

    Raises:
      ValueError: naming `where`: an empty prompt, one that is neither text nor messages, messages without data.chat or
        without one to answer, two system messages, or two beginnings of the answer.
    """
    if isinstance(prompt, str) and prompt.strip():
        if not data.chat:
            return (data.system_prompt or "") + prompt
        conversation: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    elif (problem := conversation_problem(prompt)) is None:
        if not data.chat:
            raise ValueError(
                f"{where}: data.chat must be true for a prompt that is a list of messages; set data.chat=true"
            )
        # Parquet and datasets give every message the fields of all messages.
        messages = cast(list[dict[str, Any]], prompt)
        conversation = [{name: value for name, value in message.items() if value is not None} for message in messages]
    else:
        raise ValueError(
            f"{where}: the prompt must be text or a list of messages with role and content, got {problem}; "
            f"data.columns.prompt names the column it is read from, {data.columns.get('prompt')!r}"
        )
    is_begun = conversation[-1]["role"] == "assistant"
    if is_begun and len(conversation) == 1:
        raise ValueError(
            f"{where}: the prompt must hold a message before that of the assistant, which is the beginning of the "
            f"answer, got {shown(conversation)}"
        )
    if is_begun and data.assistant_prefill:
        raise ValueError(
            f"{where}: data.assistant_prefill must be null for a prompt that ends with a message of the assistant, "
            f"which the answer goes on from, got {shown(data.assistant_prefill)} and {shown(conversation[-1])}; set "
            "data.assistant_prefill=null or leave the message out"
        )
    if data.assistant_prefill:
        conversation = [*conversation, {"role": "assistant", "content": data.assistant_prefill}]
    if data.system_prompt is None:
        return conversation
    if conversation[0]["role"] == "system":
        raise ValueError(
            f"{where}: data.system_prompt must be null for a prompt with a system message of its own, "
            f"got {data.system_prompt!r}"
        )
    return [{"role": "system", "content": data.system_prompt}, *conversation]


def _load(section: DataSection, config: Config, key: str, messages: list[str]) -> SourceRows:
    """The rows of a source. With data.answer_from_messages the last message of each is its column `answer`."""
    assert section.source is not None
    is_filtered = section.remove_empty_answers
    read = read_rows(section.source, section.args, section.columns, config.seed, section.prepare, is_filtered)
    if read.num_empty:
        total = read.num_empty + len(read.rows)
        messages.append(f"removed {read.num_empty} of {total} rows of {key} without an answer")
    rows = read.rows
    if section.answer_from_messages:
        rows = [_with_answer(row, f"{key} {read.where(index)}") for index, row in enumerate(rows)]
    return dataclasses.replace(read, rows=rows)


def _with_answer(row: Row, where: str) -> Row:
    messages = row["prompt"]
    problem = conversation_problem(messages)
    roles = [message["role"] for message in messages] if problem is None else []
    if roles and (roles[-1] != "assistant" or roles[:-1] in ([], ["system"]) or roles[-2] == "assistant"):
        problem = shown(roles)
    if problem is not None:
        raise ValueError(
            f"{where}: with data.answer_from_messages the prompt must be a list of messages with role and content that "
            f"ends with one of the assistant after one of the user, got {problem}; set "
            "data.answer_from_messages=false or correct the row"
        )
    if "answer" in row:
        raise ValueError(
            f"{where}: with data.answer_from_messages there must be no column answer, got {shown(row['answer'])}; set "
            "data.columns.answer=null, or map that column to another name"
        )
    return {**row, "prompt": messages[:-1], "answer": messages[-1]["content"]}


def _tokenize(
    read: SourceRows, data: DataSection, tokenizer: Tokenizer, key: str, messages: list[str], source: int = 0
) -> list[PromptRow]:
    """The rows whose prompt fits. A message about dropped rows is added to `messages`."""
    kept, limit, rows = [], data.max_prompt_length, read.rows
    places = [f"{key} {read.where(index)}" for index in range(len(rows))]
    prompts = [build_prompt(row["prompt"], data, place) for row, place in zip(rows, places, strict=True)]

    def encode(index: int) -> list[int]:
        prompt = prompts[index]
        try:
            prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
        except ValueError as error:
            raise ValueError(f"{places[index]}: {error}") from error
        if not prompt_ids:
            raise ValueError(f"{places[index]}: the prompt must hold at least one token, got {prompt!r}")
        return prompt_ids

    encoded, shortest = _encode_together(len(rows), encode, limit)
    for index, (row, prompt, prompt_ids) in enumerate(zip(rows, prompts, encoded, strict=True)):
        if prompt_ids is not None:
            columns = {name: value for name, value in row.items() if name != "prompt"}
            kept.append(PromptRow(prompt, prompt_ids, columns, index, places[index], source))
    if not kept:
        raise ValueError(
            f"data.max_prompt_length must let a prompt of {key} through, got {limit}; the shortest of {len(rows)} has "
            f"{shortest} tokens"
        )
    if len(kept) < len(rows):
        messages.append(
            f"dropped {len(rows) - len(kept)} of {len(rows)} prompts of {key} longer than "
            f"data.max_prompt_length={limit} tokens"
        )
    return kept


def _encode_together(size: int, encode: Callable[[int], list[int]], limit: int) -> tuple[list[np.ndarray | None], int]:
    """Calls `encode` on 0 to size - 1, each process on its own block.

    Returns:
      int32 ids of each, None where there are more than `limit`; and the smallest number of ids. `size` must be at least
      1.
    """

    from rl.devices import hosts

    def encode_block() -> tuple[np.ndarray, np.ndarray]:
        lengths, kept = [], []
        for index in range(*hosts.block(size)):
            ids = encode(index)
            lengths.append(len(ids))
            if len(ids) <= limit:
                kept.append(np.asarray(ids, np.int32))
        return np.asarray(lengths, np.int32), np.concatenate([np.zeros(0, np.int32), *kept])

    own = hosts.together(encode_block)
    lengths, flat = (np.frombuffer(b"".join(hosts.gather_bytes(part.tobytes())), np.int32) for part in own)
    fits = lengths <= limit
    pieces = iter(np.split(flat, np.cumsum(lengths[fits])[:-1]))
    return [next(pieces) if is_kept else None for is_kept in fits], int(lengths.min())


def conversation_problem(messages: Any) -> str | None:
    """The reason why a value is no list of chat messages, each with a role and a text content; None if it is one."""
    if not isinstance(messages, list) or not messages:
        return shown(messages)
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"{shown(message)} as message {index}"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"the {name} {shown(message.get(name))} in message {index}, {shown(message)}"
    return None


def _held_out_questions(questions: set[str], seed: int, size: int, key: str) -> set[str]:
    """The `size` questions with the smallest hash of (seed, question). `key` names the size."""
    if size >= len(questions):
        raise ValueError(
            f"{key} must be < {len(questions)}, the number of distinct questions, got {size}; the rest is for training"
        )

    return set(sorted(questions, key=lambda question: _hash(question, seed))[:size])


def _held_out_share(questions: set[str], seed: int, share: float, key: str) -> set[str]:
    """The questions whose hash of (seed, question) is below `share` of all hashes. `key` names the share."""
    held_out = {question for question in questions if is_held_out(question, seed, share)}
    if not 0 < len(held_out) < len(questions):
        found = "all of them" if held_out else "none"
        way_out = "lower it" if held_out else "raise it"
        raise ValueError(
            f"{key} must hold out some of {len(questions)} distinct questions, and leave others to train on, got "
            f"{share}, which holds out {found}; {way_out}"
        )
    return held_out


def is_held_out(question: str, seed: int, share: float) -> bool:
    """Whether data.eval_share holds a question out, which depends on nothing else."""
    return int.from_bytes(_hash(question, seed)[:8]) < share * 2.0**64


def _hash(question: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{question}".encode("utf-8", "surrogatepass")).digest()


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
