"""isoflop generate"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from isoflop.cli.options import Count, Json, Stored, Whole
from isoflop.cli.output import emit, note, say
from isoflop.count import Precision, Workload
from isoflop.errors import MISSING, InputError, Problem
from isoflop.quantity.units import format_bytes, format_exact, format_seconds

if TYPE_CHECKING:
    from isoflop.cli.generate_source import Source
    from isoflop.infer import Completion, Generation, Piece, Tokenizer

#: What `--tokenizer` takes beside a file.
BYTES = "bytes"


def generate(
    source: str,
    /,
    *prompts: str,
    max_tokens: Count = 64,
    temperature: float = 0.0,
    top_k: Count | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: Whole = 0,
    stop: list[str] | None = None,
    ids: Annotated[bool, Parameter(negative="")] = False,
    tokenizer: str | None = None,
    precision: Stored | None = None,
    cache: bool = True,
    as_json: Json = False,
) -> None:
    """Write what a model says after a prompt, or after each of several.

    Parameters
    ----------
    source
        A run directory, a Hugging Face folder of weights, or a spec as `isoflop show` takes it,
        which is built with random weights.
    prompts
        One text or several; they are read and written as one batch.
    max_tokens
        The most tokens to write after each prompt.
    temperature
        0 takes the likeliest token; above it one is drawn, the likelier the lower it is.
    top_k
        Draw from the K likeliest tokens.
    top_p
        Draw from the fewest likeliest tokens that have this probability together.
    min_p
        Draw from tokens at least this share as likely as the likeliest.
    repetition_penalty
        Above 1, tokens that the text already has become less likely.
    seed
        Of the draws; prompt i of several draws as one alone does with seed + i.
    stop
        A text to end before; may be given several times.
    ids
        Prompts are token numbers, as in "5 0 17", and so is what is written.
    tokenizer
        bytes, or a tokenizer.json; the source's own when not given.
    precision
        fp32, bf16 or fp16: what to cast the weights to; as they are stored when not given.
    cache
        Without, the whole text is read again for every token.
    """
    from isoflop.cli.generate_source import check_memory, find_source
    from isoflop.infer import Generation, Request, Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    request = Request(max_tokens, sampling, seed, stop_texts=tuple(stop or ()), cached=cache)
    _check(prompts, precision)
    found = find_source(source, precision)
    reads, writes = (None, None) if ids else _tokenizers(found, tokenizer, source)
    request = replace(request, stop_tokens=found.stop_tokens, start=found.start)
    rows = [reads.encode(text) if reads else _ids(text) for text in prompts]
    check_memory(found, _work(rows, request.max_tokens, found))
    model = found.load()
    started = time.perf_counter()
    generation = Generation(model, rows, request)
    written = _write(generation, writes, started, aloud=len(rows) == 1 and not as_json)
    if as_json:
        data = {"source": source, "origin": found.origin, "precision": found.precision.value}
        return emit("generate", data | _data(rows, written, generation.bytes_kv_cache))
    if len(rows) > 1:
        for prompt, completion in zip(prompts, written.completions, strict=True):
            say(f"{_shown(prompt)}{_text_of(completion)}\n")
    return note(_tell(rows, written, generation.bytes_kv_cache))


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, and how long it took: to the first token, and for each after it."""

    completions: list[Completion]
    seconds_prefill: float
    seconds_per_token: float | None


def _write(
    generation: Generation, tokenizer: Tokenizer | None, started: float, *, aloud: bool
) -> Written:
    from isoflop.infer import pieces
    from isoflop.infer.generate import completions

    come: list[Piece] = []
    first = last = started
    for piece in pieces(generation, tokenizer):
        last = time.perf_counter()
        first = last if not come else first
        come.append(piece)
        if aloud:
            shown = _shown(piece.text) if tokenizer else f"{piece.token} "
            print(shown, end="", flush=True)
    if aloud:
        say()
    done = completions(come, len(generation.begun), has_text=tokenizer is not None)
    after_first = max(len(x.tokens) for x in done) - 1
    each = (last - first) / after_first if after_first else None
    return Written(done, first - started, each)


def _check(prompts: Sequence[str], precision: Precision | None) -> None:
    problems = []
    if not prompts:
        problems.append(Problem("PROMPT", MISSING, "is given: one text or several"))
    taken = (Precision.FP32, Precision.BF16, Precision.FP16)
    if precision is not None and precision not in taken:
        rule = f"is one of {', '.join(taken)}: others are counted, not run"
        problems.append(Problem("--precision", precision.value, rule))
    if problems:
        raise InputError("command line", problems)


def _tokenizers(found: Source, said: str | None, source: str) -> tuple[Tokenizer, Tokenizer | None]:
    """What prompts are read with, and what is written: as said, or the source's own.

    Random weights read bytes, and what they write stays numbers: hardly one of them is a byte.
    """
    from isoflop.infer import ByteTokenizer, FileTokenizer

    if said is not None:
        tokenizer = ByteTokenizer() if said == BYTES else FileTokenizer(Path(said))
        return tokenizer, tokenizer
    if found.tokenizer is not None:
        return found.tokenizer, found.tokenizer
    if found.origin == "spec":
        note(f"{source}: reads bytes, writes token numbers (--tokenizer bytes or FILE: text)")
        return ByteTokenizer(), None
    hint = "say --tokenizer bytes for a run of isoflop, --tokenizer FILE, or give tokens with --ids"
    raise InputError(source, [Problem("tokenizer.json", MISSING, "is in the folder", hint)])


def _ids(text: str) -> list[int]:
    """Token numbers between spaces or commas."""
    words = re.split(r"[\s,]+", text.strip())
    if not all(re.fullmatch(r"\d{1,12}", word, re.ASCII) for word in words):
        raise InputError("command line", [Problem("PROMPT", text, "is token numbers with --ids")])
    return [int(word) for word in words]


def _work(rows: Sequence[Sequence[int]], max_tokens: int, found: Source) -> Workload:
    """What the cache will hold when the last token is written."""
    longest = max(1, *map(len, rows))
    read = longest if found.arch.encoder is None else max(1, len(found.start))
    return Workload(len(rows), 1, read + max_tokens - 1, source_len=longest)


def _data(rows: Sequence[Sequence[int]], written: Written, bytes_cache: int) -> dict[str, Any]:
    return {
        "texts": [
            {
                "prompt_tokens": list(row),
                "tokens": list(done.tokens),
                "text": done.text,
                "reason": done.reason,
            }
            for row, done in zip(rows, written.completions, strict=True)
        ],
        "seconds_prefill": written.seconds_prefill,
        "seconds_per_token": written.seconds_per_token,
        "bytes_kv_cache": bytes_cache,
    }


def _tell(rows: Sequence[Sequence[int]], written: Written, bytes_cache: int) -> str:
    said = [
        f"{format_exact(sum(map(len, rows)))} tokens of prompt and the first token in "
        f"{format_seconds(written.seconds_prefill)}"
    ]
    if written.seconds_per_token is not None:
        said.append(f"{format_seconds(written.seconds_per_token)} for each after it")
    said.append(f"cache {format_bytes(bytes_cache)}")
    return ", ".join([*said, "ended by " + ", ".join(x.reason for x in written.completions)])


def _text_of(done: Completion) -> str:
    if done.text is None:
        return " ".join(["", *map(str, done.tokens)])
    return _shown(done.text)


def _shown(text: str) -> str:
    """Text that moves no cursor and rings no bell: random bytes are also control characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
