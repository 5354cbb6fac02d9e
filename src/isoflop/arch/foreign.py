"""Documents from outside: bounded before they are parsed, refused with a place.

A `config.json` or a spec file is data of unknown origin. Python's own parsers accept
what no config means (NaN, 1e400, a key twice, half a surrogate pair) and break on
what is merely large (digits, depth), so the limits are checked first, in one pass.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from isoflop.errors import InputError, Problem

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_KEYS = 2_000
MAX_STRING = 64_000
#: Digits, sign, point and exponent together; a double needs at most 24.
MAX_NUMBER = 40
#: Values, keys and marks together; a config has a few hundred.
MAX_PIECES = 100_000
#: A spec file is a few thousand bytes; tomllib is slower than json.
MAX_TOML_BYTES = 1 << 17

#: A dotted TOML key of more parts than may nest: tomllib's time grows with their square.
_LONG_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+)"""
    f"{{{MAX_DEPTH}}}"
)
_TOKEN = re.compile(
    r'(?P<string>"[^"\\]*(?:\\.[^"\\]*)*")'
    r"|(?P<number>-?[0-9][0-9eE.+-]*)"
    r"|(?P<mark>[{}\[\],:])"
    r"|(?P<word>true|false|null)\b"
    r"|(?P<space>[ \t\n\r]+)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a document may be: in bytes, keys, and values, keys and marks together."""

    n_bytes: int = MAX_BYTES
    n_keys: int = MAX_KEYS
    n_pieces: int = MAX_PIECES


#: Those of a config. A value, not a call: a frozen default may be shared.
CONFIG = Bounds()


def open_file(path: Path) -> BinaryIO:
    """An ordinary file, open for reading.

    Raises:
        InputError: it is absent, unreadable, or no ordinary file.
    """
    where = str(path)
    try:
        # Not blocking: opening a named pipe would otherwise wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(where, [Problem("path", where, "can be read", str(reason))]) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(where, [Problem("path", where, "is an ordinary file")])
    return os.fdopen(handle, "rb")  # refuses a folder, hence after the check


def read_file(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of an ordinary file of at most `most`.

    Raises:
        InputError: it is absent, unreadable, no ordinary file, or too large.
    """
    with open_file(path) as file:
        data = file.read(most + 1)
    check_size(data, str(path), most)
    return data


def check_size(data: bytes, where: str, most: int = MAX_BYTES) -> None:
    """At most so many bytes, or `InputError`."""
    if len(data) > most:
        problem = Problem("size", f"more than {most:,} bytes", f"is at most {most:,} bytes")
        raise InputError(where, [problem])


def parse_json(data: bytes, where: str, bounds: Bounds = CONFIG) -> dict[str, Any]:
    """A JSON object, strictly read.

    >>> parse_json(b'{"n_head": 12}', "config.json")
    {'n_head': 12}
    >>> parse_json(b'{"eps": NaN}', "config.json")
    Traceback (most recent call last):
    isoflop.errors.InputError: config.json: line 1, column 9=NaN}: must be JSON
    """
    source = _Source(_decode(data, where, bounds.n_bytes), where)
    source.scan(bounds)
    try:
        value = json.loads(source.text)
    except json.JSONDecodeError as error:
        source.refuse(error.pos, source.text[error.pos : error.pos + 20], "is JSON", error.msg)
    if not isinstance(value, dict):
        problem = Problem("top level", type(value).__name__, "is an object of keys and values")
        raise InputError(where, [problem])
    return value


def parse_toml(data: bytes, where: str) -> dict[str, Any]:
    r"""A TOML document, with the same bounds.

    >>> parse_toml(b'[layer]\nwiring = "pre"', "spec.toml")
    {'layer': {'wiring': 'pre'}}
    """
    check_size(data, where, MAX_TOML_BYTES)
    text = _decode(data, where)
    if key := _LONG_KEY.search(text):
        row = text.count("\n", 0, key.start()) + 1
        rule = f"has keys of at most {MAX_DEPTH} parts"
        raise InputError(where, [Problem(f"line {row}", key.group(), rule)])
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(where, [Problem("syntax", str(error), "is TOML")]) from None
    except (ValueError, RecursionError):  # ValueError: an integer past Python's digit limit
        rule = f"nests at most {MAX_DEPTH} deep, with numbers of sensible length"
        raise InputError(where, [Problem("syntax", "too deep or too long", rule)]) from None
    check_table(value, where)
    return value


def _decode(data: bytes, where: str, most: int = MAX_BYTES) -> str:
    check_size(data, where, most)
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        problem = Problem("byte 0", "a byte order mark", "starts with its text", "save as UTF-8")
        raise InputError(where, [problem])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = Problem(f"byte {error.start}", f"0x{data[error.start]:02x}", "is UTF-8")
        raise InputError(where, [problem]) from None


@dataclass(frozen=True, slots=True)
class _Source:
    """A JSON text, and one pass over it for all that Python's parser lets through."""

    text: str
    where: str

    def scan(self, bounds: Bounds) -> None:
        keys: list[set[str]] = [set()]  # the keys seen in each open object or array
        n_keys, last = 0, ""
        for count, (at, kind, piece) in enumerate(self.pieces()):
            if count >= bounds.n_pieces:
                rule = f"is among at most {bounds.n_pieces:,} values, keys and marks"
                self.refuse(at, piece, rule)
            if kind == "string":
                self.check_string(at, piece)
            elif kind == "number":
                self.check_number(at, piece)
            elif piece in "{[":
                keys.append(set())
                if len(keys) > MAX_DEPTH + 1:
                    self.refuse(at, piece, f"nests at most {MAX_DEPTH} deep")
            elif piece in "}]":
                if len(keys) == 1:
                    self.refuse(at, piece, "closes what was opened")
                keys.pop()
            elif piece == ":" and last.startswith('"'):
                key, n_keys = self.unquote(at, last), n_keys + 1
                if key in keys[-1]:
                    self.refuse(at, key, "is given once")
                if n_keys > bounds.n_keys:
                    self.refuse(at, key, f"is among at most {bounds.n_keys:,} keys")
                keys[-1].add(key)
            last = piece

    def pieces(self) -> Iterator[tuple[int, str, str]]:
        """The tokens with their places and kinds; blanks are left out."""
        at = 0
        while at < len(self.text):
            match = _TOKEN.match(self.text, at)
            if match is None:
                self.refuse(at, self.text[at : at + 20], "is JSON")
            if match.lastgroup != "space":
                yield at, str(match.lastgroup), match.group()
            at = match.end()

    def check_string(self, at: int, quoted: str) -> None:
        if len(quoted) > MAX_STRING:
            self.refuse(at, quoted, f"is at most {MAX_STRING:,} characters")
        if "\\" in quoted:
            self.unquote(at, quoted)

    def unquote(self, at: int, quoted: str) -> str:
        try:
            value = str(json.loads(quoted))
            value.encode()
        except UnicodeEncodeError:
            self.refuse(at, quoted, "pairs its surrogates")
        except json.JSONDecodeError as error:
            self.refuse(at, quoted, "is a JSON string", error.msg)
        return value

    def check_number(self, at: int, digits: str) -> None:
        if len(digits) > MAX_NUMBER:
            self.refuse(at, digits, f"is a number of at most {MAX_NUMBER} characters")
        try:
            finite = math.isfinite(float(digits))
        except ValueError:
            self.refuse(at, digits, "is a number")
        if not finite:
            self.refuse(at, digits, "is finite")

    def refuse(self, at: int, value: str, rule: str, hint: str = "") -> NoReturn:
        row = self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        problem = Problem(f"line {row}, column {column}", value, rule, hint)
        raise InputError(self.where, [problem]) from None


def check_table(value: dict[str, Any], where: str) -> None:
    """The depth, the number of keys and the integers of a parsed table, without recursion.

    Raises:
        InputError: one of them is past its bound.
    """
    level: list[Any] = [value]
    n_keys = 0
    for _ in range(MAX_DEPTH):
        n_keys += sum(len(part) for part in level if isinstance(part, dict))
        inside = [item for part in level for item in _items(part)]
        for key, item in inside:
            if isinstance(item, int) and abs(item) >= 10**MAX_NUMBER:
                rule = f"is a number of at most {MAX_NUMBER} digits"
                raise InputError(where, [Problem(key, item, rule)])
        level = [item for _, item in inside if isinstance(item, (dict, list))]
        if not level:
            break
    if level or n_keys > MAX_KEYS:
        rule = f"has at most {MAX_KEYS:,} keys and nests at most {MAX_DEPTH} deep"
        raise InputError(where, [Problem("document", f"{n_keys} keys", rule)])


def _items(part: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(part, dict):
        yield from ((str(key), item) for key, item in part.items())
    else:
        yield from ((f"item {i}", item) for i, item in enumerate(part))
