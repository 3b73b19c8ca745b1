"""One data row as a prompt: its question, the text or messages that are asked, and their token ids.

In: the rows of a source (`rl.data.sources`), the section `data` and a tokenizer. Out: `PromptRow`s. A prompt that is
too long is dropped and counted, never cut. With several processes, each tokenizes one block of the rows and sends the
ids to the others. Not here: which rows are trained on and which are held out (`rl.data.prompts`).

Legend: T token positions.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from rl.config.load import Config
from rl.config.sections import DataSection
from rl.data.sources import SourceRows, read_rows
from rl.data.tasks import Row
from rl.data.tokenizer import Tokenizer, split_prefill
from rl.files.json_file import shown

Prompt = str | list[dict[str, Any]]


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
      asked: the prompt in the data, text or messages, without what the configuration puts around it.
    """

    prompt: Prompt
    prompt_ids: np.ndarray
    columns: dict[str, Any]
    index: int
    where: str = ""
    source: int = 0
    asked: Any = None


def answer_of(row: PromptRow) -> dict[str, Any]:
    """{"answer": the gold answer} for a record of a completion, as a JSON value; empty where the row has none."""
    if "answer" not in row.columns:
        return {}
    answer = row.columns["answer"]
    try:
        json.dumps(answer)
    except (TypeError, ValueError):
        answer = str(answer)  # a date, for instance
    return {"answer": answer}


def with_examples(section: DataSection, key: str) -> DataSection:
    """The section with the examples of data.few_shot as rows {prompt, answer}, read if a file holds them.

    A file is read as the source is: data.columns, data.prepare and data.answer_from_messages apply to it. `key` names
    the section.

    Raises:
      ValueError: naming the row: an example lacks a question or an answer, or a list has other columns.
    """
    given = section.few_shot
    if not given:
        return section
    if isinstance(given, str):
        read = read_rows(given, {}, section.columns, 0, section.prepare)
        places = [f"{key} few_shot {read.where(index)}" for index in range(len(read.rows))]
        rows = read.rows
        if section.answer_from_messages:
            rows = [_with_answer(row, place) for row, place in zip(rows, places, strict=True)]
    else:
        rows, places = given, [f"{key} few_shot row {index}" for index in range(len(given))]
        for row, place in zip(rows, places, strict=True):
            if {*row} != {"prompt", "answer"}:
                raise ValueError(f"{place} must have the columns prompt and answer, got {shown(sorted(row))}")
    plain = dataclasses.replace(section, few_shot=None, system_prompt=None, assistant_prefill=None)
    examples = []
    for row, place in zip(rows, places, strict=True):
        asked, answer = build_prompt(row["prompt"], plain, place), row.get("answer")
        roles = [] if isinstance(asked, str) else [message["role"] for message in asked]
        if roles and (roles[-1] != "user" or "system" in roles):
            raise ValueError(
                f"{place}: column 'prompt' must be messages without one of the system that end with one of the user, "
                f"got {shown(asked)}"
            )
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise ValueError(
                f"{place}: column 'answer' must hold text or a number, which the example shows, got {shown(answer)}"
            )
        examples.append({"prompt": asked, "answer": str(answer)})
    return dataclasses.replace(section, few_shot=examples)


def load_source(section: DataSection, config: Config, key: str, messages: list[str]) -> SourceRows:
    """The rows of a source. With data.answer_from_messages the last message of each is its column `answer`.

    Args:
      key: names the source. messages: gets what was left out, in words.
    """
    assert section.source is not None
    is_filtered = section.remove_empty_answers
    read = read_rows(section.source, section.args, section.columns, config.seed, section.prepare, is_filtered)
    return with_answers(read, section, key, messages)


def with_answers(read: SourceRows, section: DataSection, key: str, messages: list[str]) -> SourceRows:
    """The second half of `load_source`, for rows with Tandem's columns."""
    if read.num_empty:
        total = read.num_empty + len(read.rows)
        messages.append(f"removed {read.num_empty} of {total} rows of {key} without an answer")
    rows = read.rows
    if section.answer_from_messages:
        rows = [_with_answer(row, f"{key} {read.where(index)}") for index, row in enumerate(rows)]
    asked = {question_key(example["prompt"]) for example in _examples(section)}
    kept = [index for index, row in enumerate(rows) if not asked or question_key(row["prompt"]) not in asked]
    if len(kept) < len(rows):
        messages.append(f"removed {len(rows) - len(kept)} of {len(rows)} rows of {key} that are examples of few_shot")
        return read.kept(kept, [rows[index] for index in kept])
    return dataclasses.replace(read, rows=rows)


def _examples(section: DataSection) -> list[dict[str, Any]]:
    assert not isinstance(section.few_shot, str), "with_examples comes before"
    return section.few_shot or []


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


def tokenize(
    read: SourceRows,
    data: DataSection,
    tokenizer: Tokenizer,
    key: str,
    messages: list[str],
    source: int = 0,
    may_be_empty: bool = False,
) -> list[PromptRow]:
    """The rows whose prompt fits. A message about dropped rows is added to `messages`.

    may_be_empty: whether all may be too long.
    """
    if not read.rows:
        return []
    kept, limit, rows = [], data.max_prompt_length, read.rows
    places = [f"{key} {read.where(index)}" for index in range(len(rows))]
    prompts = [build_prompt(row["prompt"], data, place) for row, place in zip(rows, places, strict=True)]
    of_all, tokenizer = tokenizer, tokenizer.with_template_kwargs(data.chat_template_kwargs)

    def encode(index: int) -> list[int]:
        prompt = prompts[index]
        prompt_ids = encode_prompt(prompt, tokenizer, places[index])
        if not prompt_ids:
            raise ValueError(f"{places[index]}: the prompt must hold at least one token, got {prompt!r}")
        return prompt_ids

    encoded, shortest = encode_together(len(rows), encode, limit)
    if tokenizer is not of_all:  # otherwise the start of the run says it
        problems = (tokenizer.template_kwargs_problem(), tokenizer.date_problem())
        messages += [f"{key}: {problem}" for problem in problems if problem]
    for index, (row, prompt, prompt_ids) in enumerate(zip(rows, prompts, encoded, strict=True)):
        if prompt_ids is not None:
            columns = {name: value for name, value in row.items() if name != "prompt"}
            kept.append(PromptRow(prompt, prompt_ids, columns, index, places[index], source, row["prompt"]))
    if not kept and not may_be_empty:
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


def encode_together(size: int, encode: Callable[[int], list[int]], limit: int) -> tuple[list[np.ndarray | None], int]:
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


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, where: str) -> list[int]:
    """Token ids of a prompt, of text or as a chat. `where`: its place, for messages."""
    try:
        return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def build_prompt(prompt: Any, data: DataSection, where: str) -> Prompt:
    """The prompt with its system prompt and examples: text, or chat messages with data.chat. data.assistant_prefill
    then becomes a last message by the assistant. Examples (`with_examples`) are text in front of a text, and earlier
    messages of a chat, behind a system message.

    Raises:
      ValueError: naming `where`: an empty prompt, one that is neither text nor messages, messages without data.chat or
        without one to answer, two system messages, or two beginnings of the answer.
    """
    if isinstance(prompt, str) and prompt.strip():
        if not data.chat:
            shots = "".join(f"{one['prompt']}{one['answer']}{data.few_shot_separator}" for one in _examples(data))
            return (data.system_prompt or "") + shots + prompt
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
    own = 1 if conversation[0]["role"] == "system" else 0
    if own and data.system_prompt is not None:
        raise ValueError(
            f"{where}: data.system_prompt must be null for a prompt with a system message of its own, "
            f"got {data.system_prompt!r}"
        )
    system = conversation[:own] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    return [*system, *(message for one in _examples(data) for message in _as_messages(one)), *conversation[own:]]


def _as_messages(example: dict[str, Any]) -> list[dict[str, Any]]:
    asked = example["prompt"]
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    return [*asked, {"role": "assistant", "content": example["answer"]}]


def question_key(prompt: Prompt) -> str:
    """The question of a prompt, by which rows are compared: without system message and beginning of the answer, with
    case folded and spacing collapsed.
    """
    if not isinstance(prompt, str):
        asked, _ = split_prefill(prompt)
        prompt = "\n".join(message["content"] for message in asked if message["role"] != "system")
    return " ".join(prompt.casefold().split())


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
