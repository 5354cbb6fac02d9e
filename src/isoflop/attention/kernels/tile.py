"""What every pass does to a tile of scores, and which tiles it visits.

Rows are packed: row r is query r // G of the head r % G in a kv head's group, so a tile reads
its keys once for the whole group, and dK and dV of shared heads are summed in one program.
Scores are in units of log 2: exp2 is what the hardware has.

Letters: T query tokens · S key tokens · N heads · G heads of a kv head · H head size ·
BM rows and BN keys of a tile. `F` is the set of features below, known at compile time.
"""

import triton
import triton.language as tl

from isoflop.attention import philox

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROUNDS = tl.constexpr(philox.ROUNDS)

#: Features of a call, one bit each.
CAUSAL = tl.constexpr(1)
WINDOW = tl.constexpr(2)
SOFTCAP = tl.constexpr(4)
ALIBI = tl.constexpr(8)
BIAS = tl.constexpr(16)  # added to the scores
HIDE = tl.constexpr(32)  # boolean
BLOCKS = tl.constexpr(64)
PACKED = tl.constexpr(128)
DROPOUT = tl.constexpr(256)
SINKS = tl.constexpr(512)  # learned
D_BIAS = tl.constexpr(1024)  # the gradient of a bias is wanted
#: Triton's interpreter is silently wrong in bfloat16: compute in float32 there.
UPCAST = tl.constexpr(2048)


@triton.jit
def load_rows(X, row0, t, head, T, N, SIZE: tl.constexpr, WIDE: tl.constexpr, F: tl.constexpr):
    """[BM, WIDE] of a [tokens, N, SIZE] tensor, zeros outside."""
    h = tl.arange(0, WIDE)
    at = ((row0 + t).to(tl.int64) * N + head)[:, None] * SIZE + h[None, :]
    x = tl.load(X + at, mask=(t < T)[:, None] & (h < SIZE)[None, :], other=0.0)
    if UPCAST & F:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(X, x, row0, t, head, T, N, SIZE: tl.constexpr, WIDE: tl.constexpr):
    h = tl.arange(0, WIDE)
    at = ((row0 + t).to(tl.int64) * N + head)[:, None] * SIZE + h[None, :]
    tl.store(X + at, x.to(X.dtype.element_ty), mask=(t < T)[:, None] & (h < SIZE)[None, :])


@triton.jit
def sequence(b, StartQ, StartK, T, S, F: tl.constexpr):
    """First rows of a sequence's queries and keys in memory, and how many there are."""
    q0 = b * T
    k0 = b * S
    if PACKED & F:
        q0 = tl.load(StartQ + b)
        k0 = tl.load(StartK + b)
        T = tl.load(StartQ + b + 1) - q0
        S = tl.load(StartK + b + 1) - k0
    return q0, k0, T, S


@triton.jit
def key_tiles(
    row, T, S, window, sink_tokens,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Where the phases over keys begin and end, in tiles, for the rows from `row` on.

    [0, sinks) fixed sinks · [start, band) the window's edge · [band, full) all seen ·
    [full, end) the diagonal and the last keys.
    """
    first = row // G + S - T
    last = min((row + BM - 1) // G, T - 1) + S - T
    seen_by_all = S
    seen_by_one = S
    if CAUSAL & F:
        seen_by_all = min(S, max(first + 1, 0))
        seen_by_one = min(S, max(last + 1, 0))
    end = tl.cdiv(seen_by_one, BN)
    start = 0
    band = 0
    sinks = 0
    if WINDOW & F:
        start = min(max(first - window + 1, 0) // BN, end)
        band = min(max(tl.cdiv(max(last - window + 1, 0), BN), start), end)
        sinks = min(tl.cdiv(sink_tokens, BN), start)
    full = max(band, seen_by_all // BN)
    return sinks, start, band, full, end


@triton.jit
def row_tiles(
    key, T, S, window, sink_tokens,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The same for a pass over rows: [start, band) diagonal · [band, full) · [full, end) edge."""
    last_key = min(key + BN, S) - 1
    first = 0
    first_whole = 0
    end = T
    end_whole = T
    if CAUSAL & F:
        first = max(key - S + T, 0)
        first_whole = max(last_key - S + T, 0)
    if WINDOW & F:
        end_whole = min(max(key + window - S + T, 0), T)
        edge = min(max(last_key + window - S + T, 0), T)
        end = tl.where(key >= sink_tokens, edge, T)
    stop = tl.cdiv(end * G, BM)
    start = min(first * G // BM, stop)
    band = min(max(tl.cdiv(first_whole * G, BM), start), stop)
    full = min(max(end_whole * G // BM, band), stop)
    return start, band, full, stop


@triton.jit
def tanh(x):
    """By exp: Triton's own tanh does not run in its interpreter."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def adjust(
    s, b, head, t, key, T, S, scale, softcap, window, sink_tokens,
    Slope, Bias, bias_b, bias_n, bias_t, bias_s,
    Seen, seen_b, seen_n, seen_t, seen_s, block_size,
    MASKED: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """From products to scores in units of log 2, -inf where not seen; and the softcap's slope.

    `head`, `t` and `key` broadcast to the tile, whichever way it lies.
    """
    x = s * scale
    slope = x
    if SOFTCAP & F:
        capped = tanh(x / softcap)
        x = softcap * capped
        slope = 1 - capped * capped
    position = t + S - T
    inside = (t < T) & (key < S)
    if ALIBI & F:
        x -= tl.load(Slope + head) * tl.abs(position - key).to(tl.float32)
    if BIAS & F:
        at = b.to(tl.int64) * bias_b + head * bias_n + t.to(tl.int64) * bias_t + key * bias_s
        x += tl.load(Bias + at, mask=inside, other=0.0).to(tl.float32)
    x *= LOG2E
    if HIDE & F:
        at = b.to(tl.int64) * bias_b + head * bias_n + t.to(tl.int64) * bias_t + key * bias_s
        x = tl.where(tl.load(Bias + at, mask=inside, other=0) != 0, x, float("-inf"))
    if BLOCKS & F:
        at = b * seen_b + head * seen_n + t // block_size * seen_t + key // block_size * seen_s
        x = tl.where(tl.load(Seen + at, mask=inside, other=0) != 0, x, float("-inf"))
    if MASKED:
        seen = key < S
        if CAUSAL & F:
            seen = seen & (key <= position)
        if WINDOW & F:
            seen = seen & ((key > position - window) | (key < sink_tokens))
        x = tl.where(seen, x, float("-inf"))
    return x, slope


@triton.jit
def kept(seed, threshold, b, head, t, key, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN], true where dropout keeps a weight: philox.py's numbers for keys from `key` on."""
    zero = tl.zeros([BM, BN // 4], tl.int32)
    quad = key // 4 + tl.arange(0, BN // 4)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + t[:, None], zero + quad[None, :], zero + head[:, None], zero + b, ROUNDS
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BM, BN)
    return (words >> 8).to(tl.int32) >= threshold
