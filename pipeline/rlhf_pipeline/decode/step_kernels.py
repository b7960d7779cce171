"""What a decode step does between its matrix products, in few launches: norms, attention, adapters' first half.

Each kernel rounds where the model's own layers round, so that a step differs from theirs in the order of sums alone.
`CHAINED`: the kernel waits for the one before it and lets the next begin, see `nf4_gemm.dependent_launch`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_norm_kernel(
    x, first, second, x_out, weight, bias, y, weight2, bias2, y2, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr,
    TWO: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A program a row: x_out = x + first (+ second), and its norm y, or two norms of it. All (rows, WIDTH)."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    v = tl.load(x + row + column, mask=inside, other=0.0)
    dtype = v.dtype
    v = v.to(tl.float32)
    if ADDED >= 1:
        added = tl.load(first + row + column, mask=inside, other=0.0).to(tl.float32)
        if ADDED == 2:
            added += tl.load(second + row + column, mask=inside, other=0.0).to(tl.float32)
            added = added.to(dtype).to(tl.float32)
        v = (v + added).to(dtype)
        tl.store(x_out + row + column, v, mask=inside)
        v = v.to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if RMS:
        scale = tl.rsqrt(tl.sum(v * v, 0) / WIDTH + eps)
        tl.store(y + row + column, ((v * scale).to(dtype).to(tl.float32) * w).to(dtype), mask=inside)
    else:
        centred = tl.where(inside, v - tl.sum(v, 0) / WIDTH, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
        out = normed * w
        if BIAS:
            out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row + column, out.to(dtype), mask=inside)
        if TWO:
            out = normed * tl.load(weight2 + column, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                out += tl.load(bias2 + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(y2 + row + column, out.to(dtype), mask=inside)


@triton.jit
def _rotated(at, plain, partner, cos, sin, d, D: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, norm, eps):
    """A head's query or key, normed where the model does so, rotated by its position: (DP,) in float32."""
    v = tl.load(at + d, mask=d < D, other=0.0)
    p = tl.load(at + partner, mask=d < ROTARY, other=0.0)
    dtype = v.dtype
    v, p = v.to(tl.float32), p.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v = (v * scale).to(dtype).to(tl.float32) * tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        p = (p * scale).to(dtype).to(tl.float32) * tl.load(norm + partner, mask=d < ROTARY, other=0.0).to(tl.float32)
        v, p = v.to(dtype).to(tl.float32), p.to(dtype).to(tl.float32)
    turned = (v * cos).to(dtype).to(tl.float32) + (tl.where(d < ROTARY // 2, -p, p) * sin).to(dtype).to(tl.float32)
    return tl.where(plain, v, turned).to(dtype)


@triton.jit
def attend_kernel(
    q, k, v, keys, values, out, first, slot, cos, sin, q_norm, k_norm, eps, scale,
    row_q, head_q, row_k, head_k, row_v, head_v, cache_row, cache_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr,
    NORM: tl.constexpr, BT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A program a row and head: rotate, put the new key and value into the cache, attend to all of the row's tokens.

    first, slot: (rows,) int32, the row's first real cache slot and the one its new token goes to; cos, sin:
    (positions, ROTARY); keys, values: (rows, heads / GROUP, slots, D); out: (rows, HEADS, D).
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    real = d < D
    begin, end = tl.load(first + row), tl.load(slot + row)
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(d < half, d + half, d - half)
    at = (end - begin) * ROTARY + d
    c = tl.load(cos + at, mask=d < ROTARY, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=d < ROTARY, other=0.0).to(tl.float32)
    kv = head // GROUP
    plain = d >= ROTARY
    query = _rotated(q + row * row_q + head * head_q, plain, partner, c, s, d, D, ROTARY, NORM, q_norm, eps)
    key = _rotated(k + row * row_k + kv * head_k, plain, partner, c, s, d, D, ROTARY, NORM, k_norm, eps)
    value = tl.load(v + row * row_v + kv * head_v + d, mask=real, other=0.0)
    base = row.to(tl.int64) * cache_row + kv.to(tl.int64) * cache_head
    if head % GROUP == 0:
        tl.store(keys + base + end * D + d, key, mask=real)
        tl.store(values + base + end * D + d, value, mask=real)
    query = query.to(tl.float32)
    best = tl.sum(query * key.to(tl.float32), 0) * scale
    total = 1.0
    acc = value.to(tl.float32)
    for t0 in range(begin, end, BT):
        t = t0 + tl.arange(0, BT)
        seen = (t < end)[:, None] & real[None, :]
        places = base + t[:, None] * D + d[None, :]
        # Both loads before either is used: a short loop waits for memory, not for arithmetic.
        past_keys = tl.load(keys + places, mask=seen, other=0.0)
        past_values = tl.load(values + places, mask=seen, other=0.0)
        products = tl.sum(past_keys.to(tl.float32) * query[None, :], 1) * scale
        weights = tl.where(t < end, products, float("-inf"))
        higher = tl.maximum(best, tl.max(weights, 0))
        fade = tl.exp(best - higher)
        weights = tl.exp(weights - higher)
        acc = acc * fade + tl.sum(weights[:, None] * past_values.to(tl.float32), 0)
        total = total * fade + tl.sum(weights, 0)
        best = higher
    tl.store(out + (row * HEADS + head) * D + d, (acc / total).to(out.dtype.element_ty), mask=real)


@triton.jit
def low_rank_kernel(
    x, down, low, K: tl.constexpr, RANK: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr
):
    """A program a row and PART ranks: low = x down^T. x: (rows, K); down: (RANK, K); low: (rows, RANK)."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1) * PART + tl.arange(0, PART)
    acc = tl.zeros([PART, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        v = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(down + rank[:, None] * K + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        acc += w * v[None, :]
    tl.store(low + row * RANK + rank, tl.sum(acc, 1).to(low.dtype.element_ty))


@triton.jit
def gated_kernel(gate, up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """out = gate * up, elementwise; the gate's activation is in its own product. All (rows, SIZE)."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    inside = column < SIZE
    product = tl.load(gate + at, mask=inside).to(tl.float32) * tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)
