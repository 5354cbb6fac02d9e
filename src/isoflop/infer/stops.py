"""Where a text ends: at a token, at a piece of text however its tokens cut it, or at a length."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

from isoflop.infer.tokens import TextStream

#: Why a text ended: the most tokens were written, an end token was, or a stop text.
Reason: TypeAlias = Literal["length", "token", "text"]


class Ending:
    """One text as it is written: what of it is sure, and why it ended.

    Neither an end token nor a stop text is part of the text. What may yet become a stop text is
    held back until it cannot.
    """

    def __init__(
        self, stop_tokens: Collection[int], stop_texts: Sequence[str], text: TextStream | None
    ) -> None:
        self.reason: Reason | None = None
        self._stop_tokens, self._stop_texts = frozenset(stop_tokens), tuple(stop_texts)
        self._text, self._held = text, ""

    def add(self, token: int, *, is_last: bool = False) -> str:
        """What of the text has become sure with a token, the last one that may be written or not."""
        if token in self._stop_tokens:
            self.reason = "token"
        elif is_last:
            self.reason = "length"
        if self._text is None:
            return ""
        new = "" if self.reason == "token" else self._text.add(token)
        self._held += new + (self._text.end() if self.reason else "")
        return self._release()

    def _release(self) -> str:
        ends = [at for stop in self._stop_texts if (at := self._held.find(stop)) >= 0]
        if ends:
            self.reason = "text"
            return self._held[: min(ends)]
        sure = len(self._held)
        if self.reason is None:
            sure -= max((_overlap(self._held, stop) for stop in self._stop_texts), default=0)
        released, self._held = self._held[:sure], self._held[sure:]
        return released


def _overlap(text: str, stop: str) -> int:
    r"""How many characters at the end of a text may begin a stop text.

    >>> _overlap("so\n", "\n\n"), _overlap("abab", "abac"), _overlap("ab", "c")
    (1, 2, 0)
    """
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)
