"""Prompts in, texts out: one pass over the prompts, then a token of each text at a time.

Letters: B batch · T tokens of a prompt · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isoflop.arch.rules import Rules
from isoflop.arch.spec import Arch, Learned, Rope
from isoflop.errors import MISSING, InputError, Problem
from isoflop.infer.read import Cached, Encoded, Model, Reader, Recomputed, padded
from isoflop.infer.sample import GREEDY, Sampling, choose, uniforms
from isoflop.infer.stops import Ending, Reason
from isoflop.infer.tokens import Tokenizer
from isoflop.model import EncoderDecoder
from isoflop.model.experts.module import GroupedLinear
from isoflop.model.parts import HeadModule
from isoflop.model.rope_scaling import turns_outdated


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be written after every prompt.

    Attributes:
        max_tokens: the most tokens, an end token counted.
        seed: row i of a batch draws as a single prompt does with `seed` + i.
        stop_tokens: tokens that end a text.
        stop_texts: what ends a text, however its tokens cut it; needs a tokenizer.
        start: what an encoder-decoder's answer begins with (T5: its padding token); others: none.
        cached: False reads the whole text again for every token.

    Raises:
        InputError: a number that its rule cannot have.
    """

    max_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    start: tuple[int, ...] = ()
    cached: bool = True

    def __post_init__(self) -> None:
        rules = Rules(self).size("max_tokens").size("seed", least=0)
        rules.must("stop_texts", "are no empty texts", all(self.stop_texts))
        rules.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """A token that was written, what of its row's text became sure, and why it is the last."""

    row: int
    token: int
    text: str
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """What was written after one prompt; `text` is None where no tokenizer was given.

    The tokens are all that were written; the text ends before an end token or a stop text.
    """

    tokens: tuple[int, ...]
    text: str | None
    reason: Reason


class Generation:
    """Texts that are being written; `steps` writes them, once."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], request: Request) -> None:
        """Make room for all that will be read; nothing is computed but an encoder's pass.

        Raises:
            InputError: no prompt or an empty one, tokens that the model does not have, more than
                there are positions, a model in training or of several precisions; all are listed.
        """
        check(model, prompts, request)
        self.model, self.request = model, request
        encoded, self.begun = None, [list(prompt) for prompt in prompts]
        if isinstance(model, EncoderDecoder):
            with torch.inference_mode():
                encoded = Encoded.of(model, prompts)
            self.begun = [list(request.start) for _ in prompts]
        # The last token that is written is never read.
        n_tokens = max(map(len, self.begun)) + request.max_tokens - 1
        make = Cached if request.cached else Recomputed
        with torch.inference_mode():
            self.reader: Reader = make(model, len(prompts), n_tokens, encoded)

    @property
    def bytes_kv_cache(self) -> int:
        return self.reader.bytes_kv_cache

    @torch.inference_mode()
    def steps(self) -> Iterator[Tensor]:
        """The next token of every text, [B], `max_tokens` times; they stay on the model's device."""
        sampling, n_rows = self.request.sampling, len(self.begun)
        device = self.model.embedding.tokens.weight.device
        draws = torch.zeros(self.request.max_tokens, n_rows)
        if sampling.temperature > 0:
            draws = uniforms([self.request.seed + i for i in range(n_rows)], len(draws))
        tokens_BT, counts = padded(self.begun, device), list(map(len, self.begun))
        written_BV = self._written(device)
        for i, uniform_B in enumerate(draws.to(device)):
            logits_BV = self.reader.read(tokens_BT, counts)
            if i == 0 or device.type == "cpu":  # asking a GPU would make it wait
                _check_finite(self.model.arch, logits_BV)
            token_B = choose(logits_BV, sampling, uniform_B, written_BV)
            yield token_B
            tokens_BT, counts = token_B[:, None], [1] * n_rows
            if written_BV is not None:
                written_BV.scatter_(1, tokens_BT, value=True)

    def _written(self, device: torch.device) -> Tensor | None:
        """Which tokens each text has, [B, V], where that matters."""
        if self.request.sampling.repetition_penalty == 1.0:
            return None
        shape = len(self.begun), self.model.arch.vocab_size
        written_BV = torch.zeros(shape, dtype=torch.bool, device=device)
        for row, tokens in zip(written_BV, self.begun, strict=True):
            row[tokens] = True
        return written_BV


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    request: Request,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Piece]:
    """Each token as it is written, text by text; a text that has ended writes no more.

    Raises:
        InputError: as `Generation`; or stop texts without a tokenizer.
    """
    generation = Generation(model, prompts, request)
    return pieces(generation, tokenizer)


def pieces(generation: Generation, tokenizer: Tokenizer | None = None) -> Iterator[Piece]:
    """The same of texts that are ready to be written."""
    request = generation.request
    if request.stop_texts and tokenizer is None:
        raise InputError("request", [Problem("tokenizer", MISSING, "is given with stop_texts")])
    return _pieces(generation, tokenizer)


def _pieces(generation: Generation, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    request = generation.request
    endings = [
        Ending(request.stop_tokens, request.stop_texts, tokenizer.stream() if tokenizer else None)
        for _ in generation.begun
    ]
    for n, token_B in enumerate(generation.steps(), start=1):
        for row, token in enumerate(token_B.tolist()):
            if endings[row].reason is None:
                text = endings[row].add(token, is_last=n == request.max_tokens)
                yield Piece(row, token, text, endings[row].reason)
        if all(ending.reason for ending in endings):
            return


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    request: Request,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """What follows each prompt.

    >>> from isoflop.arch import gpt
    >>> from isoflop.model import build
    >>> tiny = gpt("tiny", d_model=8, n_layers=1, n_heads=2, vocab_size=11, max_seq_len=16)
    >>> done = generate(build(tiny).eval(), [[1, 2, 3], [4]], Request(max_tokens=5))
    >>> [len(completion.tokens) for completion in done]
    [5, 5]

    Raises:
        InputError: as `stream`.
    """
    come = stream(model, prompts, request, tokenizer)
    return completions(come, len(prompts), has_text=tokenizer is not None)


def completions(come: Iterable[Piece], n_rows: int, *, has_text: bool) -> list[Completion]:
    """The pieces of a batch of texts, put together."""
    rows: list[list[Piece]] = [[] for _ in range(n_rows)]
    for piece in come:
        rows[piece.row].append(piece)
    return [
        Completion(
            tokens=tuple(piece.token for piece in row),
            text="".join(piece.text for piece in row) if has_text else None,
            reason=row[-1].reason or "length",
        )
        for row in rows
    ]


def check(model: Model, prompts: Sequence[Sequence[int]], request: Request) -> None:
    """Refuse what cannot be written.

    Raises:
        InputError: as `Generation`.
    """
    problems = []
    if model.training:
        hint = "call model.eval()"
        problems.append(Problem("model", "in training", "is in evaluation mode", hint))
    if not prompts:
        problems.append(Problem("prompts", 0, "is at least one"))
    begun = prompts
    if isinstance(model, EncoderDecoder):
        begun = [request.start]
        if not request.start:
            problems.append(Problem("start", MISSING, "is given where there is an encoder"))
    elif request.start:
        problems.append(Problem("start", request.start, "is empty where there is no encoder"))
    rows = {f"prompts[{i}]": prompt for i, prompt in enumerate(prompts)}
    problems += _bad_tokens(model.arch, rows | ({"start": request.start} if request.start else {}))
    problems += _too_far(model.arch, {len(x) for x in begun}, request)
    problems += _mixed(model)
    if problems:
        raise InputError(model.arch.name, problems)


def _bad_tokens(arch: Arch, rows: Mapping[str, Sequence[int]]) -> Iterator[Problem]:
    for name, row in rows.items():
        if not row:
            yield Problem(name, "no tokens", "has at least one token")
        beyond = next((x for x in row if not 0 <= x < arch.vocab_size), None)
        if beyond is not None:
            rule = f"lies from 0 to {arch.vocab_size - 1:,}, the tokens there are"
            yield Problem(name, beyond, rule)


def _too_far(arch: Arch, lengths: set[int], request: Request) -> Iterator[Problem]:
    """More tokens than positions; or keys in a cache that a longer text turns otherwise."""
    if not lengths or min(lengths) == 0:
        return
    learned, longest = arch.embedding.position, max(lengths) + request.max_tokens - 1
    if isinstance(learned, Learned) and longest > learned.n_positions:
        rule = f"is at most {learned.n_positions:,}, the learned positions"
        hint = f"a prompt of {max(lengths):,} tokens leaves room for max_tokens="
        room = max(0, learned.n_positions - max(lengths) + 1)
        yield Problem("tokens", longest, rule, f"{hint}{room:,}")
    if not request.cached:
        return
    for kind in arch.kinds.values():
        if not isinstance(rope := kind.attention.position, Rope):
            continue
        ends = ((n - 1, n + request.max_tokens - 2) for n in lengths)
        if any(turns_outdated(rope.scaling, arch.max_seq_len, *end) for end in ends):
            rule = "turns no cached key otherwise as the text grows"
            hint = "write fewer tokens, or without a cache (cached=False, --no-cache)"
            yield Problem("position.scaling", rope.scaling.kind if rope.scaling else "", rule, hint)


def _mixed(model: Model) -> Iterator[Problem]:
    """Products of two precisions: none is cast to the other without a word."""
    kinds = nn.Linear, nn.Embedding, HeadModule, GroupedLinear
    maps = (x for x in model.modules() if isinstance(x, kinds))
    dtypes = {str(x.dtype) for module in maps for x in module.parameters(recurse=False)}
    if len(dtypes) > 1:
        hint = "cast all to one (load_model(dtype=...), --precision bf16)"
        yield Problem("weights", ", ".join(sorted(dtypes)), "have one precision", hint)


def _check_finite(arch: Arch, logits_BV: Tensor) -> None:
    """Weights that are no numbers, or overflow, would write nonsense without a word."""
    if not bool(logits_BV.sum(dtype=torch.float64).isfinite()):
        hint = "the weights are broken, or overflow in their precision"
        raise InputError(arch.name, [Problem("logits", "not finite", "are numbers", hint)])
