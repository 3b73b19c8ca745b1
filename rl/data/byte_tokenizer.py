"""The tokenizer called `byte`: 256 bytes and three special tokens, without a file, and without importing transformers.

In: nothing. Out: a backend with the part of `PreTrainedTokenizerFast`'s interface that `rl.data.tokenizer.Tokenizer`
reads. transformers, whose import takes a second, is needed only to write the tokenizer's files.
"""

import os
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

_PAD, _BOS, _EOS = _SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class ByteBackend:
    """Ids 0, 1, 2 are pad, bos, eos; byte b is 3 + b. Raw text gets a BOS in front.

    Attributes and methods are those of `PreTrainedTokenizerFast`, and give what it gives for the same tokenizer.
    """

    pad_token, bos_token, eos_token = _SPECIAL_TOKENS

    def __init__(self) -> None:
        first_byte = len(_SPECIAL_TOKENS)
        vocabulary = {token: token_id for token_id, token in enumerate(_SPECIAL_TOKENS)}
        vocabulary |= {character: first_byte + byte for byte, character in enumerate(_byte_characters())}
        core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
        core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, vocabulary[_BOS])]
        )
        core.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS])
        self.backend_tokenizer = core
        self.chat_template: Any = _CHAT_TEMPLATE
        self.init_kwargs: dict[str, Any] = {}

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _PAD}

    @property
    def all_special_tokens(self) -> list[str]:
        return [_BOS, _EOS, _PAD]

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    def get_chat_template(self) -> str:
        return self.chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        assert not clean_up_tokenization_spaces
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def as_transformers(self) -> Any:
        """The same tokenizer as a `PreTrainedTokenizerFast`."""
        # Without this, transformers advises to install PyTorch, which is not needed.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast

        backend = PreTrainedTokenizerFast(
            tokenizer_object=self.backend_tokenizer,
            pad_token=_PAD,
            bos_token=_BOS,
            eos_token=_EOS,
            chat_template=self.chat_template,
            clean_up_tokenization_spaces=False,
        )
        backend.init_kwargs.update(self.init_kwargs)
        return backend

    def save_pretrained(self, folder: str) -> None:
        self.as_transformers().save_pretrained(folder)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py (bytes_to_unicode): printable bytes stand for themselves,
    the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
