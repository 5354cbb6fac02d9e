"""Text to tokens and back.

Runs of isoflop read bytes; a Hugging Face folder says in its tokenizer.json what it reads.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from isoflop.errors import InputError, Problem

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
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
        """With the special tokens that its template puts around a text."""
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
