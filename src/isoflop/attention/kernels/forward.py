"""The forward pass: FlashAttention-2, algorithm 1 (Dao 2023, 2307.08691), on packed rows."""

import triton
import triton.language as tl

from isoflop.attention.kernels.tile import (
    BLOCKS,
    DROPOUT,
    LN2,
    LOG2E,
    SINKS,
    adjust,
    kept,
    key_tiles,
    load_rows,
    sequence,
    store_rows,
)


@triton.jit
def forward(
    Q, K, V, Out, Lse, Sink, Slope, Bias, Seen, List, Count, StartQ, StartK,
    T, S, N, scale, softcap, window, sink_tokens, seed, threshold, keep_scale,
    bias_b, bias_n, bias_t, bias_s, seen_b, seen_n, seen_t, seen_s, block_size, n_list,
    LENGTH, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, WH: tl.constexpr,
    WV: tl.constexpr, PRECISION: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Out and Lse of BM rows of one kv head; grid (tiles of rows, kv heads, sequences)."""
    tile, shared, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0, k0, T, S = sequence(b, StartQ, StartK, T, S, F)
    row = tile * BM + tl.arange(0, BM)
    t = row // G
    head = shared * G + row % G
    q = load_rows(Q, q0, t, head, T, N, H, WH, F)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINKS & F:  # a learned sink is in the denominator before any key
        m = tl.load(Sink + head).to(tl.float32) * LOG2E
        total = tl.full([BM], 1.0, tl.float32)
    acc = tl.zeros([BM, WV], tl.float32)
    sinks, start, band, full, end = key_tiles(tile * BM, T, S, window, sink_tokens, G, BM, BN, F)
    listed = (b * tl.num_programs(1) + shared) * tl.num_programs(0) + tile
    for phase in tl.static_range(4):
        lo, hi = full, end
        if BLOCKS & F:
            lo, hi = 0, 0
            if phase == 0:
                hi = tl.load(Count + listed)
        elif phase == 0:
            lo, hi = 0, sinks
        elif phase == 1:
            lo, hi = start, band
        elif phase == 2:
            lo, hi = band, full
        for i in range(lo, hi):
            j = i
            if BLOCKS & F:
                j = tl.load(List + listed * n_list + i)
            key = j * BN + tl.arange(0, BN)
            k = load_rows(K, k0, key, shared, S, N // G, H, WH, F)
            v = load_rows(V, k0, key, shared, S, N // G, HV, WV, F)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            x, _ = adjust(
                s, b, head[:, None], t[:, None], key[None, :], T, S, scale, softcap, window,
                sink_tokens, Slope, Bias, bias_b, bias_n, bias_t, bias_s,
                Seen, seen_b, seen_n, seen_t, seen_s, block_size, phase != 2, F,
            )  # fmt: skip
            higher = tl.maximum(m, tl.max(x, 1))
            # A row that has seen nothing yet has no peak to take off.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(x - base[:, None])
            shrink = tl.exp2(m - base)
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT & F:
                keep = kept(seed, threshold, b, head, t, j * BN, BM, BN)
                p = tl.where(keep, p * keep_scale, 0.0)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            m = higher
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    store_rows(Out, acc / total[:, None], q0, t, head, T, N, HV, WV)
    lse = tl.where(blind, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(Lse + (q0 + t) * N + head, lse, mask=t < T)
