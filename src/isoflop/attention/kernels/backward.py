"""The backward pass: FlashAttention-2, algorithm 2, cut in two so that nothing needs an atomic.

One kernel owns tiles of keys and sums dK and dV over rows, another owns tiles of rows and sums
dQ over keys. Each score is made twice, and equal calls give equal bits.
"""

import triton
import triton.language as tl

from isoflop.attention.kernels.tile import (
    BLOCKS,
    D_BIAS,
    DROPOUT,
    LOG2E,
    SOFTCAP,
    adjust,
    kept,
    key_tiles,
    load_rows,
    row_tiles,
    sequence,
    store_rows,
)


@triton.jit
def row_flow(
    Out, D_out, Lse, D_lse, Flow, Base, n_rows, HV: tl.constexpr, WV: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What each row takes off its weights' gradients, and its log for exp2; blind rows give 0."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    out = load_rows(Out, 0, row, 0, n_rows, 1, HV, WV, F).to(tl.float32)
    d_out = load_rows(D_out, 0, row, 0, n_rows, 1, HV, WV, F).to(tl.float32)
    lse = tl.load(Lse + row, mask=row < n_rows, other=0.0)
    d_lse = tl.load(D_lse + row, mask=row < n_rows, other=0.0)
    blind = lse == float("-inf")
    flow = tl.where(blind, 0.0, tl.sum(out * d_out, 1) - d_lse)
    tl.store(Flow + row, flow, mask=row < n_rows)
    tl.store(Base + row, tl.where(blind, float("inf"), lse * LOG2E), mask=row < n_rows)


@triton.jit
def backward_kv(
    Q, K, V, D_out, Base, Flow, D_k, D_v, Slope, Bias, Seen, List, Count, StartQ, StartK,
    T, S, N, scale, softcap, window, sink_tokens, seed, threshold, keep_scale,
    bias_b, bias_n, bias_t, bias_s, seen_b, seen_n, seen_t, seen_s, block_size, n_list,
    LENGTH, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, WH: tl.constexpr,
    WV: tl.constexpr, PRECISION: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one kv head; grid (tiles of keys, kv heads, sequences).

    Tiles lie on their side, [BN, BM], so that no product needs one turned.
    """
    tile, shared, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0, k0, T, S = sequence(b, StartQ, StartK, T, S, F)
    key = tile * BN + tl.arange(0, BN)
    k = load_rows(K, k0, key, shared, S, N // G, H, WH, F)
    v = load_rows(V, k0, key, shared, S, N // G, HV, WV, F)
    d_k = tl.zeros([BN, WH], tl.float32)
    d_v = tl.zeros([BN, WV], tl.float32)
    start, band, full, end = row_tiles(tile * BN, T, S, window, sink_tokens, G, BM, BN, F)
    listed = (b * tl.num_programs(1) + shared) * tl.num_programs(0) + tile
    for phase in tl.static_range(3):
        lo, hi = full, end
        if BLOCKS & F:
            lo, hi = 0, 0
            if phase == 0:
                hi = tl.load(Count + listed)
        elif phase == 0:
            lo, hi = start, band
        elif phase == 1:
            lo, hi = band, full
        for i in range(lo, hi):
            j = i
            if BLOCKS & F:
                j = tl.load(List + listed * n_list + i)
            row = j * BM + tl.arange(0, BM)
            t = row // G
            head = shared * G + row % G
            q = load_rows(Q, q0, t, head, T, N, H, WH, F)
            d_out = load_rows(D_out, q0, t, head, T, N, HV, WV, F)
            at = (q0 + t) * N + head
            base = tl.load(Base + at, mask=t < T, other=float("inf"))
            flow = tl.load(Flow + at, mask=t < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            x, slope = adjust(
                s, b, head[None, :], t[None, :], key[:, None], T, S, scale, softcap, window,
                sink_tokens, Slope, Bias, bias_b, bias_n, bias_t, bias_s,
                Seen, seen_b, seen_n, seen_t, seen_s, block_size, phase != 1, F,
            )  # fmt: skip
            p = tl.exp2(x - base[None, :])
            d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            dropped = p
            if DROPOUT & F:
                keep = tl.trans(kept(seed, threshold, b, head, t, tile * BN, BM, BN))
                dropped = tl.where(keep, p * keep_scale, 0.0)
                d_p = tl.where(keep, d_p * keep_scale, 0.0)
            d_v = tl.dot(dropped.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
            d_s = p * (d_p - flow[None, :])
            if SOFTCAP & F:
                d_s = d_s * slope
            d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    store_rows(D_k, d_k * scale, k0, key, shared, S, N // G, H, WH)
    store_rows(D_v, d_v, k0, key, shared, S, N // G, HV, WV)


@triton.jit
def backward_q(
    Q, K, V, D_out, Base, Flow, D_q, D_scores, Slope, Bias, Seen, List, Count, StartQ, StartK,
    T, S, N, scale, softcap, window, sink_tokens, seed, threshold, keep_scale,
    bias_b, bias_n, bias_t, bias_s, seen_b, seen_n, seen_t, seen_s, block_size, n_list,
    LENGTH, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, WH: tl.constexpr,
    WV: tl.constexpr, PRECISION: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ of BM rows of one kv head, and each score's gradient where a bias wants it."""
    tile, shared, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    whole_T, whole_S = T, S
    q0, k0, T, S = sequence(b, StartQ, StartK, T, S, F)
    row = tile * BM + tl.arange(0, BM)
    t = row // G
    head = shared * G + row % G
    q = load_rows(Q, q0, t, head, T, N, H, WH, F)
    d_out = load_rows(D_out, q0, t, head, T, N, HV, WV, F)
    at = (q0 + t) * N + head
    base = tl.load(Base + at, mask=t < T, other=float("inf"))
    flow = tl.load(Flow + at, mask=t < T, other=0.0)
    d_q = tl.zeros([BM, WH], tl.float32)
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
            x, slope = adjust(
                s, b, head[:, None], t[:, None], key[None, :], T, S, scale, softcap, window,
                sink_tokens, Slope, Bias, bias_b, bias_n, bias_t, bias_s,
                Seen, seen_b, seen_n, seen_t, seen_s, block_size, phase != 2, F,
            )  # fmt: skip
            p = tl.exp2(x - base[:, None])
            d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            if DROPOUT & F:
                keep = kept(seed, threshold, b, head, t, j * BN, BM, BN)
                d_p = tl.where(keep, d_p * keep_scale, 0.0)
            d_s = p * (d_p - flow[:, None])
            if D_BIAS & F:
                line = (b.to(tl.int64) * N + head) * whole_T + t
                place = line[:, None] * whole_S + key[None, :]
                tl.store(D_scores + place, d_s, mask=(t < T)[:, None] & (key < S)[None, :])
            if SOFTCAP & F:
                d_s = d_s * slope
            d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
    store_rows(D_q, d_q * scale, q0, t, head, T, N, H, WH)
