"""Text to tokens and back.

Runs of isoflop read bytes; a Hugging Face folder says in its tokenizer.json what it reads, and
`byte_tokenizer_files` are what says so of bytes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from isoflop.errors import InputError, Problem

if TYPE_CHECKING:
    import tokenizers

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
#: What stands for bytes that are no text.
NO_TEXT = "\ufffd"
N_BYTES = 256


class TextStream(Protocol):
    """Text that grows by a token at a time; a character may take several."""

    def add(self, token: int) -> str:
        """What of the text has become sure."""

    def end(self) -> str:
        """The rest."""


class Tokenizer(Protocol):
    """What a model's tokens mean."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def stream(self) -> TextStream:
        """A text that begins with the next token."""


class ByteTokenizer:
    """Tokens are the bytes of UTF-8.

    >>> ByteTokenizer().encode("é")
    [195, 169]
    >>> ByteTokenizer().decode([195, 169, 33])
    'é!'
    """

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        stream = self.stream()
        return "".join(map(stream.add, tokens)) + stream.end()

    def stream(self) -> TextStream:
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        if token < N_BYTES:
            return self._decoder.decode(bytes([token]))
        return self.end() + NO_TEXT

    def end(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class FileTokenizer:
    """What a tokenizer.json says, read by Hugging Face's own library."""

    def __init__(self, path: Path | str) -> None:
        """Read the file, or the one in a folder.

        Raises:
            InputError: there is none, or the library does not understand it.
        """
        from tokenizers import Tokenizer as Library

        path = Path(path)
        path = path / TOKENIZER if path.is_dir() else path
        if not path.is_file():
            raise InputError(str(path), [Problem("tokenizer", str(path), "is a file")])
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            problem = Problem("tokenizer", str(error), "is understood by the tokenizers library")
            raise InputError(str(path), [problem]) from None

    def encode(self, text: str) -> list[int]:
        """With the special tokens that its template puts around a text.

        Raises:
            InputError: the text came from bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            problem = Problem("PROMPT", text, "is UTF-8 for this tokenizer")
            raise InputError("command line", [problem]) from None
        return list(self._library.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self._library.decode(list(tokens)))

    def stream(self) -> TextStream:
        return _FileStream(self._library)


class _FileStream:
    def __init__(self, library: tokenizers.Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._library, self._stream = library, DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        self._tokens.append(token)
        sure = self._stream.step(self._library, token) or ""
        self._given += sure
        return sure

    def end(self) -> str:
        """What the library held back, for it may have been the beginning of a character."""
        return str(self._library.decode(self._tokens))[len(self._given) :]


def byte_tokenizer_files(max_seq_len: int) -> dict[str, str]:
    """By their names, the files that let other software read bytes: a token is a byte's value.

    No token is special, so every text is its UTF-8 and comes back as it was. None of the special
    tokens that transformers would give a family by itself is taken, nor its spaces tidied. (For
    the family qwen2 transformers 5 composes accents first, whatever a tokenizer.json says.)
    """
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token")),
    }
    return {
        TOKENIZER: _byte_library().to_str(pretty=True) + "\n",
        TOKENIZER_CONFIG: json.dumps(said, indent=2) + "\n",
    }


def _byte_library() -> tokenizers.Tokenizer:
    """Pairs are never merged and texts never cut, so each byte stays a token."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.BPE(vocab=_byte_names(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


def _byte_names() -> dict[str, int]:
    """The characters that stand for bytes in such files, each with its byte.

    A printable character of Latin-1 is its own; the others follow from U+0100 on in order (GPT-2,
    encoder.py, bytes_to_unicode).

    >>> names = _byte_names()
    >>> names["A"], names["\u0100"], names["\u0120"]
    (65, 0, 32)
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(N_BYTES) if byte not in own]
    names = {chr(byte): byte for byte in own}
    return names | {chr(N_BYTES + i): byte for i, byte in enumerate(others)}
