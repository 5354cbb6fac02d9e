"""The key-value cache: per kind of layer, plain or paged."""

from __future__ import annotations

from isoflop.arch.spec import Arch, Attention, BlockSparse, Chunked, LatentAttention, Layer, Window
from isoflop.count.blocks import Scope, names_of
from isoflop.count.workload import Precision, Workload
from isoflop.errors import InputError, Problem
from isoflop.quantity import Expr, Node, Symbol, branch, ceil_div, leaf, minimum


def bytes_kv_cache(
    arch: Arch, workload: Workload, precision: Precision, *, page: int | None = None
) -> Node:
    """The key-value cache of `batch` sequences of `context` tokens, by kind of layer.

    Keys and values of every cached token; a windowed layer keeps its window only (a block-sparse
    one without a stride its local blocks), latent attention keeps the latent and the shared rotated key. A decoder behind an encoder also
    keeps the keys and values of what the encoder read. With `page`, each sequence's tokens are
    rounded up to whole pages of that many (Kwon 2023, 2309.06180, section 4.3).

    Raises:
        InputError: a page of less than one token.

    >>> from isoflop.arch import llama
    >>> l3 = llama("l3", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
    ...            vocab_size=128256, max_seq_len=8192)
    >>> bytes_kv_cache(l3, Workload.decode(1, 8192), Precision.BF16).value
    1073741824
    >>> bytes_kv_cache(l3, Workload.decode(1, 17), Precision.BF16, page=16).value // 131072
    32
    """
    if page is not None and page < 1:
        raise InputError("count", [Problem("page", page, "is at least 1 token")])
    scope = names_of(arch, workload)
    children = [
        leaf(
            name,
            "bytes",
            workload.B
            * _paged(_tokens_kept(layer, workload, scope), page)
            * _numbers_of(layer.attention, scope.within(name))
            * precision.bytes_each,
            times=scope.within(name)("n_layers", arch.times(name), f"layers of the kind {name}"),
        )
        for name, layer in arch.kinds.items()
    ]
    children += [
        leaf(
            f"{name}_cross",
            "bytes",
            workload.B
            * _paged(workload.source, page)
            * _numbers_of(layer.cross, scope.within(f"{name}_cross"))
            * precision.bytes_each,
            times=scope.within(name)("n_layers", arch.times(name), f"layers of the kind {name}"),
        )
        for name, layer in arch.kinds.items()
        if layer.cross is not None
    ]
    return branch("bytes_kv_cache", "bytes", children)


def _paged(tokens: Expr, page: int | None) -> Expr:
    if page is None:
        return tokens
    size = Symbol("tokens_per_page", page, meaning="tokens in one page of the cache")
    return ceil_div(tokens, size) * size


def _tokens_kept(layer: Layer, workload: Workload, scope: Scope) -> Expr:
    inside = scope.within(layer.name)
    match layer.attention:
        case Attention(span=Window(window=w)):
            return minimum(workload.S, inside("window", w, "latest keys that a query sees"))
        case Attention(span=Chunked(chunk=c)):
            return minimum(workload.S, inside("chunk", c, "tokens of an attention chunk"))
        case Attention(span=BlockSparse(block=block, n_local=n, stride=0)):
            local = inside("d_local", block * n, "keys in a query's local blocks")
            return minimum(workload.S, local)
    return workload.S  # with a stride, which keys a later query needs depends on where it stands


def _numbers_of(attention: Attention | LatentAttention, inside: Scope) -> Expr:
    """Numbers cached per token."""
    match attention:
        case Attention() as spec:
            kv = inside("n_kv_heads", spec.n_kv_heads, "key-value heads")
            return 2 * kv * inside("d_head", spec.d_head, "size of a head")
        case LatentAttention() as spec:
            latent = inside("d_kv_latent", spec.d_kv_latent, "size of the cached latent")
            return latent + inside("d_head_rope", spec.d_head_rope, "rotated head size")
