"""Text in, token ids out, and back: a thin wrapper around a Hugging Face fast tokenizer.

Sources are a Hugging Face folder, a hub id, or `byte`: an in-memory tokenizer of 256 bytes and three special tokens
that needs no file and loses nothing. The tokenizer's own rules decide about BOS and the chat template; nothing here
truncates or pads. transformers is imported only when a tokenizer is loaded.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rl.errors import MODEL, missing
from rl.files.json_file import Fields, briefly, check_files, check_is_file, read_object, shown
from rl.files.stores import local_copy
from rl.files.untrusted import Untrusted, UntrustedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rl.data.byte_tokenizer import ByteBackend

Messages = list[dict[str, Any]]

BYTE_SOURCE = "byte"
MAX_TEMPLATE_BYTES = 1_000_000
MOST_FREE_IDS = 100_000  # of a vocabulary, besides as many as it has tokens
_TOKENIZER_FILES = ["tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*.jinja"]
_TEXT_MARK = "tandem_text_prompts"  # in tokenizer_config.json
_CLOCK = "strftime_now"  # the function that tells a chat template the time
_DAYS = ("2001-02-03T04:05:06", "2012-11-10T17:18:19")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Tokenizer:
    """A fast tokenizer with the few operations that training, sampling and export need.

    Attributes:
      backend: the wrapped `PreTrainedTokenizerFast`, or what stands for one of bytes.
      eos_ids: ids that end a completion by the tokenizer's own settings; empty without an EOS. A model may add more.
      bos_id, pad_id: None when the tokenizer has none. `pad_id` may equal an EOS id, because no mask is made from it.
      vocab_size: highest token id + 1, special and added tokens included.
      template_name: what messages call the chat template.

    Args:
      template_kwargs: variables of the chat template, such as enable_thinking, by name.
      clock: the time in ISO 8601 that chat templates are told in place of the present; None: the present.
    """

    def __init__(
        self,
        backend: "PreTrainedTokenizerFast | ByteBackend",
        template_name: str = "the tokenizer's chat template",
        template_kwargs: Mapping[str, Any] | None = None,
        clock: str | None = None,
    ) -> None:
        self.backend = backend
        self.template_name = template_name
        self._template_kwargs = dict(template_kwargs or {})
        self.clock = clock
        self._untrusted: Untrusted | None = None  # renders chats; made for the first chat
        self._is_checked = False  # whether the template has shown that it writes what messages say
        self._writes_the_date = False
        eos_id = _token_id(backend, backend.eos_token)
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)
        self.bos_id: int | None = _token_id(backend, backend.bos_token)
        self.pad_id: int | None = _token_id(backend, backend.pad_token)
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self._prefix_ids = _prefix_ids(backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return bool(self.backend.chat_template)

    def with_template_kwargs(self, template_kwargs: Mapping[str, Any]) -> "Tokenizer":
        """The same tokenizer with other variables of the chat template; itself where they are its own."""
        if dict(template_kwargs) == self._template_kwargs:
            return self
        return Tokenizer(self.backend, self.template_name, template_kwargs, self.clock)

    @property
    def asks_the_time(self) -> bool:
        """Whether the chat template calls for the time, which `clock` then is."""
        return self.has_chat_template and _CLOCK in self.backend.get_chat_template()

    def with_clock(self, clock: str) -> "Tokenizer":
        """The same tokenizer with a fixed time for `strftime_now`, which some chat templates write the date with. So
        chats that are rendered on different days are the same text.

        Raises:
          ValueError: `clock` is no time in ISO 8601, such as 2026-11-29T12:00:00.
        """
        try:
            datetime.fromisoformat(clock)
        except ValueError as error:
            raise ValueError(
                f"the clock of chat templates must be a time in ISO 8601, got {clock!r}: {error}"
            ) from error
        return Tokenizer(self.backend, self.template_name, self._template_kwargs, clock)

    @property
    def is_of_text_prompts(self) -> bool:
        """Whether the model in this tokenizer's folder was trained on prompts of plain text (`mark_prompts`)."""
        return self.backend.init_kwargs.get(_TEXT_MARK) is True

    def mark_prompts(self, chat: bool) -> None:
        """Has `save_pretrained` write beside the model whether its prompts are chats, or plain text in spite of a chat
        template.
        """
        self.backend.init_kwargs.pop(_TEXT_MARK, None)
        if not chat:
            self.backend.init_kwargs[_TEXT_MARK] = True

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of raw text.

        With `add_bos` the text gets the tokenizer's default beginning of raw text (BOS for Llama and Gemma, nothing for
        Qwen), unless it starts with it already. An EOS that the tokenizer would append is left out, because the policy
        writes what follows a prompt. Without `add_bos` nothing is added, for text from a chat template and for the
        continuation of a prompt.

        Raises:
          ValueError: the text is not valid Unicode (a lone surrogate, which JSON can carry).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode, got {text[:80]!r}: {error}") from error
        with _explain_failures(f"the tokenizer must encode {text[:80]!r}"):
            ids = list(self.backend.encode(text, add_special_tokens=False))
        if add_bos and ids[: len(self._prefix_ids)] != self._prefix_ids:
            return self._prefix_ids + ids
        return ids

    def num_added(self, text: str, token_ids: Sequence[int]) -> int:
        """The number of tokens that `encode` put before those of the text, of which `token_ids` are all."""
        size = len(self._prefix_ids)
        if not size or list(token_ids[:size]) != self._prefix_ids:
            return 0
        return 0 if text.startswith(self.decode(self._prefix_ids, skip_special_tokens=False)) else size

    def render_chat(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The messages as text by the tokenizer's own Jinja template, up to the point where the assistant continues.

        A last message by the assistant is the beginning of the answer: the messages before it are rendered, and its
        content follows unchanged. The template is a program by others, so it runs in a process of its own, which is
        ended when it takes too long.

        Args:
          tools: JSON schemas of the functions that the assistant may call.

        Raises:
          ValueError: there is no chat template, or it refuses the messages (Gemma's wants user and assistant in turn),
            fails, takes or writes too much, or ignores the text of the messages.
        """
        messages, prefill = split_prefill(messages)
        assert messages, "an answer that begins without a message to answer"
        text = self.render(messages, tools)
        if not self._is_checked:
            self._check_that_messages_matter(messages, tools, text)
            if self.clock is None and self.asks_the_time:
                self._writes_the_date = len({self._render(messages, tools, now=now) for now in _DAYS}) > 1
            self._is_checked = True
        return text + prefill

    def render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of a whole conversation, up to the point where the assistant writes its next message.

        Raises:
          ValueError: there is no chat template, or it refuses the messages, fails, takes or writes too much.
        """
        if not self.has_chat_template:
            raise ValueError(
                "the tokenizer must have a chat template for a chat prompt, got none; set tokenizer.chat_template to a "
                "Jinja file, use an instruction-tuned model's tokenizer, or set data.chat=false"
            )
        try:
            return self._render(messages, tools)
        except UntrustedError as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"{self.template_name} must accept messages with roles {shown(roles)}, got {error}; change "
                "data.system_prompt or the messages, or set tokenizer.chat_template to another Jinja file"
            ) from error

    def template_kwargs_problem(self) -> str | None:
        """A message about `template_kwargs` that the chat template never reads; None without any.

        Raises:
          ValueError: the template is no Jinja template.
        """
        if not self._template_kwargs:
            return None
        read = self.template_variables()
        unread = [name for name in self._template_kwargs if name not in read]
        if not unread:
            return None
        return (
            f"data.chat_template_kwargs: {self.template_name} never reads {', '.join(unread)}, so what is set there "
            "changes nothing; correct the name or leave it out"
        )

    def template_variables(self) -> set[str]:
        """The names that the chat template reads.

        Raises:
          ValueError: the template is no Jinja template.
        """
        try:
            return self._process().variables(self.backend.get_chat_template())
        except UntrustedError as error:
            raise ValueError(
                f"{self.template_name} must be a Jinja template, got {error}; set tokenizer.chat_template to another "
                "Jinja file"
            ) from error

    def writes_generation_prompt(self, messages: Messages, answer: str) -> bool:
        """Whether the answer of the assistant comes right after the rendered messages: because the template writes a
        generation prompt, or because its answers have no header.

        Raises:
          ValueError: see `render`.
        """
        asking = self.render(messages)
        try:
            if self._render(messages, asks=False) != asking:
                return True
            answered = self._render([*messages, {"role": "assistant", "content": answer}], asks=False)
        except UntrustedError:  # it wants a generation prompt, or no answer
            return True
        return not answered.startswith(asking) or answered.removeprefix(asking).lstrip().startswith(answer)

    def date_problem(self) -> str | None:
        """A message where chats, as the first one showed, hold the date of the day; None otherwise."""
        if not self._writes_the_date:
            return None
        return (
            f"{self.template_name} writes the date of the day into every prompt, so a run that goes on tomorrow has "
            "other prompts and is refused as another run; set the variable that the template reads instead, such as "
            'data.chat_template_kwargs={date_string: "26 Jul 2024"}, or tokenizer.chat_template to a file without '
            f"{_CLOCK}"
        )

    def _process(self) -> Untrusted:
        if self._untrusted is None:
            self._untrusted = Untrusted()
        return self._untrusted

    def _render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] = (), asks: bool = True, now: str | None = None
    ) -> str:
        variables = {**self.backend.special_tokens_map, "tools": None, "documents": None, **self._template_kwargs}
        variables |= {"messages": messages, "add_generation_prompt": asks}
        if tools:
            variables["tools"] = list(tools)
        return self._process().render(self.backend.get_chat_template(), variables, now or self.clock)

    def _check_that_messages_matter(self, messages: Messages, tools: Sequence[Mapping[str, Any]], text: str) -> None:
        """ValueError where other words in the first or the last message give the same text."""
        for index in sorted({0, len(messages) - 1}):
            message = messages[index]
            changed = [*messages[:index], {**message, "content": f"{message['content']} 7 "}, *messages[index + 1 :]]
            try:
                is_ignored = self._render(changed, tools) == text
            except UntrustedError:  # the template wants certain words, so it reads them
                is_ignored = False
            if is_ignored:
                raise ValueError(
                    f"{self.template_name} must write what the messages say, got the same text for other words of the "
                    f"{message['role']!r} message; set tokenizer.chat_template to another Jinja file, leave such "
                    "messages out (data.system_prompt=null), or set data.chat=false"
                )

    def encode_chat(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of `render_chat(messages, tools)`. BOS is there if the template writes it, and never twice."""
        # apply_chat_template does the same, but its result differs between versions.
        return self.encode(self.render_chat(messages, tools), add_bos=False)

    def encode_answered(self, messages: Messages) -> list[int]:
        """Token ids of a chat up to and with its last message, by the tokenizer's own Jinja template, as
        `apply_chat_template` of transformers gives them. BOS and EOS are there if the template writes them.

        Raises:
          ValueError: there is no chat template, or it refuses the messages, fails, takes or writes too much.
        """
        roles = shown([message.get("role") for message in messages])
        if not self.has_chat_template:
            raise ValueError(f"{self.template_name} must exist to write messages with roles {roles}, got none")
        try:
            text = self._render(messages, asks=False)
        except UntrustedError as error:
            raise ValueError(f"{self.template_name} must accept messages with roles {roles}, got {error}") from error
        return self.encode(text, add_bos=False)

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens as text."""
        return list(self.backend.all_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, exactly: no clean-up of spaces, whatever the tokenizer's settings say."""
        ids = [int(token_id) for token_id in ids]
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def content_hash(self) -> str:
        """A hash over everything that decides its ids."""
        template = [self.backend.chat_template, self._template_kwargs]
        if self.clock is not None and self.asks_the_time:
            template.append(self.clock)
        parts = [self.backend.backend_tokenizer.to_str(), json.dumps(template), repr(self.eos_ids)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer's files into a Hugging Face folder, chat template included."""
        self.backend.save_pretrained(os.fspath(folder))
        # transformers 5 writes a class name that transformers 4 does not know; both know the older one.
        path = pathlib.Path(folder) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def split_prefill(messages: Messages) -> tuple[Messages, str]:
    """(messages to answer, beginning of the answer), which is the content of a last message by the assistant."""
    if messages[-1]["role"] != "assistant":
        return messages, ""
    return messages[:-1], messages[-1]["content"]


def load_tokenizer(
    source: str | os.PathLike,
    chat_template_path: str | os.PathLike | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    key: str = "tokenizer.source",
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      source: a folder with tokenizer.json, a hub id, or `byte`. The network is used for a hub id only.
      chat_template_path: a Jinja file that replaces the tokenizer's own chat template.
      template_kwargs: see `Tokenizer`.
      key: what names the source, for messages: model.source where that has the tokenizer, too.

    Raises:
      ValueError: the folder or the template file is missing, the folder holds no fast tokenizer, or the hub id cannot
        be loaded.
    """
    source = os.fspath(source)
    backend = _byte_backend() if source == BYTE_SOURCE else _load_backend(source, key)
    if chat_template_path is not None:
        backend.chat_template = _read_template(local_copy(chat_template_path))
        return Tokenizer(backend, f"tokenizer.chat_template {os.fspath(chat_template_path)!r}", template_kwargs)
    _check_template(source, backend)
    try:
        return Tokenizer(backend, f"the chat template of tokenizer {source!r}", template_kwargs)
    except ValueError as error:
        raise ValueError(f"tokenizer {source!r}: {error}") from error


def _check_template(source: str, backend: "PreTrainedTokenizerFast | ByteBackend") -> None:
    """ValueError for a template that is no text or is too long, and for several templates without a default."""
    template = backend.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if backend.chat_template and (not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES):
        raise ValueError(
            f"the chat template of tokenizer {source!r} must be text of at most {MAX_TEMPLATE_BYTES} characters, or "
            f"have a version called default, got {shown(backend.chat_template)}; set tokenizer.chat_template to a "
            "Jinja file"
        )


def _read_template(path: pathlib.Path) -> str:
    rule = f"tokenizer.chat_template must be a Jinja file in UTF-8 of at most {MAX_TEMPLATE_BYTES} bytes"
    check_is_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(content) > MAX_TEMPLATE_BYTES:
            raise ValueError(f"{rule}, got {str(path)!r}, which is larger")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{rule}, got {str(path)!r}: {error}") from error


def _load_backend(source: str, key: str) -> "PreTrainedTokenizerFast":
    folder = local_copy(source)
    if not folder.is_dir():
        folder = download_tokenizer(source, key)
    check_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"tokenizer {source!r} must hold tokenizer.json, got a folder without it; convert an older tokenizer with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    _check_ids(folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    for path in sorted(folder.glob("*.jinja")):
        _read_template(path)
    # Not AutoTokenizer, which may rebuild the tokenizer from its class name instead of reading tokenizer.json.
    fast_class = _fast_tokenizer_class()
    with _explain_failures(f"tokenizer folder {str(folder)!r} must hold a tokenizer that transformers can read"):
        backend = fast_class.from_pretrained(str(folder), local_files_only=True)
        for adds in (False, True):
            backend.decode(backend.encode("a 1", add_special_tokens=adds))
    return backend


@contextlib.contextmanager
def _explain_failures(rule: str) -> Iterator[None]:
    """ValueError for any error of the libraries about files that contradict themselves. Where their Rust code panics,
    the error is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"{rule}, got {problem}; fetch the tokenizer's files again") from error


def _check_ids(path: pathlib.Path) -> None:
    """ValueError for a file that is no tokenizer, and for ids with too many free ids between them: the tokenizers
    library prints each of those, and would never end.
    """
    fields = Fields(read_object(path), f"{path}: ")
    vocabulary = fields.section("model").values.get("vocab")
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise ValueError(f"{path} must hold a tokenizer with a vocabulary (model.vocab), got {shown(vocabulary)}")
    limit = 2 * len(vocabulary) + MOST_FREE_IDS
    if isinstance(vocabulary, dict):
        for token, token_id in vocabulary.items():
            if type(token_id) is not int or not 0 <= token_id < limit:
                raise ValueError(
                    f"{path}: the ids of {len(vocabulary)} tokens must be whole numbers from 0 to {limit - 1}, got "
                    f"{shown(token_id)} for {shown(token)}"
                )
    for token in fields.sections("added_tokens"):
        token.whole("id", 0, limit - 1)


def download_tokenizer(source: str, key: str) -> pathlib.Path:
    """The local copy of the tokenizer files of a hub repository, which may have none. key: what names the source, for
    messages: tokenizer.source, model.source, or MODEL of a command. ValueError where there is no such repository.
    """
    rule, hint = "a Hugging Face folder, a hub id that this machine can reach, or 'byte'", ""
    if key == "model.source":
        rule = "a Hugging Face folder or a hub id that this machine can reach"
        hint = "`grpo sft` writes OUTPUT_DIR/export after its last step, `grpo export RUN FOLDER` any folder"
    if key == "MODEL":
        rule = MODEL
    if not _HUB_ID.fullmatch(source):
        raise missing(key, rule, source, hint)
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=_TOKENIZER_FILES))
    except (OSError, ValueError) as error:  # no network and not in the cache, no such repository, no access
        tried = f"the hub says: {briefly(error)}"
        raise missing(key, rule, source, f"{hint}; {tried}" if hint else tried) from error


def _fast_tokenizer_class() -> "type[PreTrainedTokenizerFast]":
    # Without this, transformers advises to install PyTorch, which is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _token_id(backend: "PreTrainedTokenizerFast | ByteBackend", token: Any) -> int | None:
    if token is None:
        return None
    token_id = backend.get_vocab().get(str(token))
    if token_id is None:
        raise ValueError(
            f"the tokenizer's special tokens must be in its vocabulary, got {shown(str(token))}, which is not"
        )
    return token_id


def _prefix_ids(backend: "PreTrainedTokenizerFast | ByteBackend") -> list[int]:
    """The ids that the tokenizer puts in front of raw text by default, found on a probe."""
    probe = "a"
    plain = list(backend.encode(probe, add_special_tokens=False))
    full = list(backend.encode(probe, add_special_tokens=True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ValueError(
        f"the tokenizer must encode text the same with and without special tokens, got {full} and {plain} for {probe!r}"
    )


def _byte_backend() -> "ByteBackend":
    from rl.data.byte_tokenizer import ByteBackend  # only where it is asked for: it imports tokenizers

    return ByteBackend()
