"""Whether tokenizer, chat template and model agree: how a completion ends, how a prompt begins, and who speaks next.

In: a configuration and its tokenizer. Out: findings. No weights are read. What the start of a run says by itself
(variables that a template never reads, dates in prompts) is left to it.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rl.config.load import Config
from rl.data.prompt_rows import PromptRow
from rl.data.tokenizer import Messages, Tokenizer
from rl.files.json_file import read_object
from rl.models.files.hf import SHAPE_PATTERNS, resolve_source
from rl.sampler.create import eos_ids
from rl.state.origin import folder_source
from rl.tools.doctor.findings import Finding
from rl.tools.programs.loop_programs import read_shape

_SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget")  # of the templates of model families
_QUESTION, _ANSWER = "What is 2+2?", "It is four."
_SHOWN = 12  # token ids


def token_findings(config: Config, tokenizer: Tokenizer, rows: Sequence[PromptRow]) -> list[Finding]:
    """Findings about the tokenizer and its template. rows: of the run's prompts, for their first tokens.

    Raises:
      ValueError: the model's files are not there or contradict themselves, or the template is none.
    """
    source = config.tokenizer.source or folder_source(config) or "byte"
    found = [Finding("ok", "tokenizer", f"{source}, {tokenizer.vocab_size} ids")]
    found += [*_ends(config, tokenizer), *_beginnings(tokenizer, rows)]
    is_chat = config.data.chat or any(not isinstance(row.prompt, str) for row in rows)
    if not tokenizer.has_chat_template:
        return [*found, Finding("ok", "chat template", "none; prompts are plain text")]
    if not is_chat:
        return [*found, Finding("note", "chat template", "not used, data.chat is false: prompts are plain text")]
    messages: Messages = [{"role": "user", "content": _QUESTION}]
    if config.data.system_prompt is not None:
        messages = [{"role": "system", "content": config.data.system_prompt}, *messages]
    try:
        found += _turns(config, tokenizer, messages)
    except ValueError as error:  # the run's own messages may be others; the start renders them
        found.append(
            Finding("note", "chat template", f"it refuses a plain question, so its turns are not known: {error}")
        )
    return [*found, *_thinking(config, tokenizer)]


def eos_sets(config: Config, tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """{where: the EOS ids that it names}, for the files of the model and its tokenizer; those that name none are left
    out.
    """
    sets: dict[str, tuple[int, ...]] = {}
    if (source := folder_source(config)) is not None:
        folder = pathlib.Path(resolve_source(source, SHAPE_PATTERNS))
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                values = read_object(folder / name)
                inner = values.get("text_config")
                named = values.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
                sets[name] = _whole_numbers(named)
    sets["tokenizer"] = tokenizer.eos_ids
    return {name: tuple(sorted(set(ids))) for name, ids in sets.items() if ids}


def _whole_numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int)


def _ends(config: Config, tokenizer: Tokenizer) -> Iterator[Finding]:
    used = eos_ids(config, read_shape(config)[1], tokenizer)
    sets = eos_sets(config, tokenizer)
    named = ", ".join(f"{where} {_named(tokenizer, ids)}" for where, ids in sets.items())
    if len(set(sets.values())) > 1:
        if config.sampling.eos_ids is None:
            way_out = (
                f"each of these ends a completion; sampling.eos_ids={list(used)} says so itself, or leave some out"
            )
            yield Finding("note", "EOS", f"the sets differ: {named}", way_out)
        else:
            yield Finding("note", "EOS", f"sampling.eos_ids {_named(tokenizer, used)} is used; the files say: {named}")
    else:
        yield Finding("ok", "EOS", f"{_named(tokenizer, used)} ends a completion")
    if config.sampling.eos_ids is not None and not {*used} & set().union(*sets.values()) and sets:
        yield Finding(
            "change",
            "EOS",
            f"sampling.eos_ids {list(used)} has none of the model's own ({named}), which never end a completion then",
            "add them to sampling.eos_ids, or set it to null",
        )


def _beginnings(tokenizer: Tokenizer, rows: Sequence[PromptRow]) -> Iterator[Finding]:
    if tokenizer.bos_id is None:
        yield Finding("ok", "BOS", "the tokenizer has none")
        return
    counts = []
    for row in rows:
        ids = list(row.prompt_ids)
        counts.append(next((place for place, each in enumerate(ids) if each != tokenizer.bos_id), len(ids)))
    name = _named(tokenizer, (tokenizer.bos_id,))
    if any(count > 1 for count in counts):
        yield Finding(
            "change",
            "BOS",
            f"{name} stands {max(counts)} times at the beginning of a prompt",
            "take it out of the template (tokenizer.chat_template), or out of the prompts of data.source",
        )
    elif counts:
        yield Finding("ok", "BOS", f"{name}, {'once' if all(counts) else 'not written'} at the beginning of a prompt")


def _turns(config: Config, tokenizer: Tokenizer, messages: Messages) -> Iterator[Finding]:
    asking = tokenizer.render(messages)
    if not tokenizer.writes_generation_prompt(messages, _ANSWER):
        yield Finding(
            "change",
            "generation prompt",
            f"{tokenizer.template_name} ignores add_generation_prompt: a prompt ends with {asking[-40:]!r}, before the "
            "header that its answers have, so the policy must write that itself",
            "set tokenizer.chat_template to a Jinja file with one",
        )
    else:
        yield Finding("ok", "generation prompt", f"a prompt ends with {asking[-40:]!r}")
    answered = tokenizer.encode_answered([*messages, {"role": "assistant", "content": _ANSWER}])
    ids, special = list(answered), set(tokenizer.encode("".join(tokenizer.special_tokens), add_bos=False))
    while ids and ids[-1] not in special:  # a newline behind the end of a turn
        ids.pop()
    rest = tokenizer.decode(answered[len(ids) :]).strip()
    if ids and not rest:
        used = eos_ids(config, read_shape(config)[1], tokenizer)
        if ids[-1] in used:
            yield Finding("ok", "end of a turn", f"{_named(tokenizer, ids[-1:])}, which ends a completion")
        else:
            yield Finding(
                "change",
                "end of a turn",
                f"{_named(tokenizer, ids[-1:])} by the template, which does not end a completion: a model that was "
                "trained on it goes on to the length limit",
                f"set sampling.eos_ids={sorted({*used, ids[-1]})}",
            )


def _thinking(config: Config, tokenizer: Tokenizer) -> Iterator[Finding]:
    given = config.data.chat_template_kwargs
    read = tokenizer.template_variables()
    for name in _SWITCHES:
        if name in given:
            yield Finding("ok", "thinking switch", f"data.chat_template_kwargs sets {name}={given[name]}")
        elif name in read:
            yield Finding(
                "note",
                "thinking switch",
                f"the template reads {name}, which is left to its default; a model that thinks needs more than short "
                f"completions (sampling.max_completion_length is {config.sampling.max_completion_length})",
                f"data.chat_template_kwargs={{{name}: {'false' if 'thinking' in name else 'low'}}} sets it",
            )


def _named(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    shown = ", ".join(f"{each} {tokenizer.decode([each], skip_special_tokens=False)!r}" for each in ids[:_SHOWN])
    return f"[{shown}{', ...' if len(ids) > _SHOWN else ''}]"
