"""The Triton kernels of passes over whole sequences."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def dequantise_kernel(
    packed, codes, steps, code_values, offset, levels, out, blocks, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program turns BLOCKS blocks of 64 weights, 32 bytes each, into numbers.

    The same operations in the same order as bitsandbytes' two passes, hence the same bits: launch it without fusing
    products and sums.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    code = tl.load(codes + block, mask=there, other=0).to(tl.int32)
    scale = tl.load(code_values + code) * tl.load(steps + block // 256, mask=there, other=0.0) + tl.load(offset)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + byte, mask=there[:, None], other=0).to(tl.int32)
    first = tl.load(levels + (pair >> 4)) * scale[:, None]
    second = tl.load(levels + (pair & 15)) * scale[:, None]
    weights = tl.reshape(tl.join(first, second), BLOCKS, 64).to(out.dtype.element_ty)
    tl.store(out + block[:, None] * 64 + tl.arange(0, 64)[None, :], weights, mask=there[:, None])


@triton.jit
def _rotate(
    source, target, cos, sin, head, heads, s_head, t_head, d, SIZE: tl.constexpr, ROTARY: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = ROTARY // 2
    there = (head < heads)[:, None] & (d < SIZE)[None, :]
    x = tl.load(source + head[:, None] * s_head + d[None, :], mask=there, other=0.0)
    out = x.to(tl.float32)
    if ROTARY > 0:
        partner = tl.where(d < half, d + half, d - half)
        turned = d < ROTARY
        y = tl.load(source + head[:, None] * s_head + partner[None, :], mask=there & turned[None, :], other=0.0)
        c = tl.load(cos + d, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + (partner if BACK else d), mask=turned, other=0.0).to(tl.float32)
        s = tl.where((d < half) != BACK, -s, s)
        out = out * c[None, :] + y.to(tl.float32) * s[None, :]
    tl.store(target + head[:, None] * t_head + d[None, :], out.to(x.dtype), mask=there)


@triton.jit
def rotate_kernel(
    query, key, value, query_out, key_out, value_out, cos, sin, tokens, heads, key_heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, q_row, k_row, t_head,
    c_batch, c_token,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROTARY: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Programs (batch * tokens, blocks of heads of query, key and, if wanted, value): rotate by position, or back.

    query, key, value: (batch, heads, tokens, SIZE) by strides; value is only moved. The targets: by the strides of a
    token, q_row and k_row, and of a head. cos, sin: (batch, tokens, ROTARY), for the first so many values of a head.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    d = tl.arange(0, PADDED)
    cos += batch * c_batch + token * c_token
    sin += batch * c_batch + token * c_token
    query_blocks, key_blocks = tl.cdiv(heads, HEADS), tl.cdiv(key_heads, HEADS)
    block = tl.program_id(1)
    if block < query_blocks:
        _rotate(
            query + batch * q_batch + token * q_token, query_out + row * q_row, cos, sin,
            block * HEADS + tl.arange(0, HEADS), heads, q_head, t_head, d, SIZE, ROTARY, BACK,
        )  # fmt: skip
    elif block < query_blocks + key_blocks:
        _rotate(
            key + batch * k_batch + token * k_token, key_out + row * k_row, cos, sin,
            (block - query_blocks) * HEADS + tl.arange(0, HEADS), key_heads, k_head, t_head, d, SIZE, ROTARY, BACK,
        )  # fmt: skip
    else:
        _rotate(
            value + batch * v_batch + token * v_token, value_out + row * k_row, cos, sin,
            (block - query_blocks - key_blocks) * HEADS + tl.arange(0, HEADS), key_heads, v_head, t_head, d, SIZE, 0,
            BACK,
        )  # fmt: skip
