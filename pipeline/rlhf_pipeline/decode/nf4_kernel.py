"""The kernel of `nf4_gemm`, in Gluon, Triton's lower level: a few rows times a 4-bit weight, act(x W^T + bias + t B^T).

The weight and its scales are bitsandbytes' own buffers, read in place: packed NF4 in blocks of 64 weights, whose scales
are 8-bit codes in blocks of 256. How it works, and what each part bought on an H200 (docs/lab-notes.md):
- A ring of asynchronous copies brings packed weights and activations into shared memory, `STAGES` units ahead.
- A byte is two weights. A table of all 256 pairs, copied once for each of the 32 banks, turns it into two bfloat16 with
  one conflict-free load; without `TABLE`, byte permutes do, which takes no shared memory.
- The weights sit on the long side of the tensor cores' instruction (m16n8k16), so 8 rows of x waste nothing.
- A block's scale is applied to its partial product in float32, not to its weights.
- Units of work (a tile of outputs times a block of inputs) are dealt out evenly over the thread blocks. A tile that
  several of them share is summed by the last to finish, always in the same order: results repeat to the bit.
- Everything that depends on weights alone starts under the tail of the kernel before (`PDL`, from sm_90 on).
"""

# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

# Named as in Triton 3.6, or as in 3.9.
fetch = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
all_threads = getattr(gl, "thread_barrier", None) or gl.barrier

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def bfloat16_bits(value: float) -> int:
    """The 16 bits of `value` as bfloat16, rounded to nearest even."""
    import struct

    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


LEVELS = [bfloat16_bits(value) for value in NF4]


def _word(four: list[int]) -> str:
    return f"0x{four[0] | four[1] << 8 | four[2] << 16 | four[3] << 24:08x}"


def _permuted_half(low_bits: str, high_bits: str, first: str, second: str) -> str:
    """Four weights of 16 packed bits: their low and their high bytes from two 8-entry tables each, then interleaved."""
    low, high = [level & 255 for level in LEVELS], [level >> 8 for level in LEVELS]
    return f"""
    prmt.b32 m, 0xff00, 0, {high_bits};
    prmt.b32 a, {_word(low[0:4])}, {_word(low[4:8])}, {low_bits};
    prmt.b32 b, {_word(low[8:12])}, {_word(low[12:16])}, {low_bits};
    prmt.b32 c, {_word(high[0:4])}, {_word(high[4:8])}, {low_bits};
    prmt.b32 d, {_word(high[8:12])}, {_word(high[12:16])}, {low_bits};
    lop3.b32 a, a, b, m, 0xd8;
    lop3.b32 c, c, d, m, 0xd8;
    prmt.b32 {first}, a, c, 0x4051;
    prmt.b32 {second}, a, c, 0x6273;"""


_SPLIT = "and.b32 s7, $4, 0x77777777; shr.u32 ss, $4, 3; and.b32 ss, ss, 0x11111111;"
PERMUTE = gl.constexpr(
    "{ .reg .b32 m, a, b, c, d, s7, ss, t7, ts;"
    + _SPLIT
    + _permuted_half("s7", "ss", "$0", "$1")
    + " shr.u32 t7, s7, 16; shr.u32 ts, ss, 16;"
    + _permuted_half("t7", "ts", "$2", "$3")
    + "}"
)
# Byte j of the packed word, times 32 banks of 4 bytes, plus the table's address and this lane's bank.
LOOK_UP = gl.constexpr(
    "{ .reg .b32 a;"
    + "".join(f" prmt.b32 a, $4, 0, 0x444{j}; mad.lo.u32 a, a, 128, $5; ld.shared.b32 ${j}, [a];" for j in range(4))
    + "}"
)
DECODED = gl.constexpr("=r,=r,=r,=r,r,r,r,r,r")
DECLARE = gl.constexpr(".shared .align 128 .b32 nf4_pairs[8192]; mov.u32 $0, nf4_pairs;")
FILL = gl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, 0;")
LANE = gl.constexpr("mov.u32 $0, %laneid;")
# Lane j of each quad holds the scale of the j-th block of 64; every lane of the quad gets it.
FROM_QUAD = gl.constexpr(
    "{ .reg .b32 l; mov.u32 l, %laneid; and.b32 l, l, 28; or.b32 l, l, $2; shfl.sync.idx.b32 $0, $1, l, 31, -1; }"
)
NEXT_MAY_START = gl.constexpr("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
WAIT_FOR_INPUTS = gl.constexpr("griddepcontrol.wait; mov.u32 $0, 0;")


@gluon.jit
def _fetch_weights(
    unit, end, slot, weight, ring, K: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, WARPS: gl.constexpr
):
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // (BK // 32), BK // 32], [WARPS, 1], [1, 0])
    row = gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
    byte = gl.arange(0, BK // 2, layout=gl.SliceLayout(0, layout))
    tile = unit // (K // BK)
    block = unit % (K // BK)
    source = weight + (tile * BN).to(gl.int64) * (K // 2) + block * (BK // 2)
    fetch(ring.index(slot), source + row[:, None] * (K // 2) + byte[None, :], mask=(row[:, None] >= 0) & (unit < end))


@gluon.jit
def _fetch_inputs(
    unit, end, slot, x, ring, rows, K: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr
):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    block = unit % (K // BK)
    for j in gl.static_range(BK // 64):
        fetch(
            ring.index(slot * (BK // 64) + j),
            x + block * BK + j * 64 + row[:, None] * K + column[None, :],
            mask=(row[:, None] < rows) & (unit < end),
        )


@gluon.jit
def _fetch_scales(
    unit, end, lane, codes, steps, K: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, layout: gl.constexpr
):
    """Lane j of each quad fetches what belongs to its j-th block of 64; the compiler believes that they hold copies."""
    unit = gl.minimum(unit, end - 1)
    row = (unit // (K // BK)) * BN + gl.arange(0, BN, layout=layout)
    block = row * (K // 64) + (unit % (K // BK)) * (BK // 64) + lane
    return gl.load(codes + block), gl.load(steps + block // 256)


@gluon.jit
def _activated(v, ACTIVATION: gl.constexpr):
    """gelu, gelu_tanh, silu, relu of float32 values that were rounded to bfloat16, as the model's own layers do."""
    if ACTIVATION != "none":
        v = v.to(gl.bfloat16).to(gl.float32)
    if ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + gl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (v + 0.044715 * v * v * v)
        v = v * (1.0 - 1.0 / (gl.exp(2.0 * inner) + 1.0))
    elif ACTIVATION == "silu":
        v = v / (1.0 + gl.exp(-v))
    elif ACTIVATION == "relu":
        v = gl.maximum(v, 0.0)
    return v


@gluon.jit(do_not_specialize=["rows"])
def nf4_gemm_kernel(
    x, weight, codes, steps, code_values, offset, pairs, bias, low, up, y, partial, arrived, rows,
    N: gl.constexpr, K: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, TABLE: gl.constexpr, BIAS: gl.constexpr, RANK: gl.constexpr, ACTIVATION: gl.constexpr,
    PDL: gl.constexpr, INPUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """x: (rows, K) bfloat16; y: (rows, N) bfloat16; low: (rows, RANK) and up: (N, RANK) bfloat16, RANK 0 for none.

    partial: float32, two tiles for each thread block; arrived: int32 zeros, one for each tile, left as zeros.
    """
    BLOCKS: gl.constexpr = K // BK
    SUB: gl.constexpr = BK // 64
    UNITS: gl.constexpr = BLOCKS * (N // BN)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    packed: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    programs = gl.num_programs(0)
    pid = gl.program_id(0)
    first = pid * UNITS // programs
    end = (pid + 1) * UNITS // programs
    w_ring = gl.allocate_shared_memory(
        gl.uint8,
        [STAGES, BN, BK // 2],
        gl.SwizzledSharedLayout(16, 256 // BK if BK < 256 else 1, 8 if BK >= 256 else BK // 32, order=[1, 0]),
    )
    x_ring = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES * SUB, BM, 64], gl.SwizzledSharedLayout(32, 1, 2, order=[1, 0])
    )
    one = gl.full([1], 0, gl.int32, layout=threads)
    if PDL:
        gl.inline_asm_elementwise(NEXT_MAY_START, "=r,r", [one], dtype=gl.int32, is_pure=False, pack=1)

    # 1. What depends on weights alone. Small loads go ahead of the ring: behind it they would wait for all its bytes.
    shift = gl.load(offset)
    zero_rows = gl.full([BN], 0, gl.int32, layout=by_row)
    lane = gl.inline_asm_elementwise(LANE, "=r,r", [zero_rows], dtype=gl.int32, is_pure=True, pack=1)
    lane = lane & (SUB - 1)
    code, step = _fetch_scales(first, end, lane, codes, steps, K, BN, BK, by_row)
    next_code, next_step = _fetch_scales(first + 1, end, lane, codes, steps, K, BN, BK, by_row)
    for stage in gl.static_range(STAGES):
        _fetch_weights(first + stage, end, stage, weight, w_ring, K, BN, BK, WARPS)
        if not PDL:
            _fetch_inputs(first + stage, end, stage, x, x_ring, rows, K, BK, BM, WARPS)
            async_copy.commit_group()
    value = gl.load(code_values + code.to(gl.int32))
    bank = gl.full([BN, 32], 0, gl.int32, layout=packed)
    if TABLE:
        base = gl.max(gl.inline_asm_elementwise(DECLARE, "=r,r", [one], dtype=gl.int32, is_pure=False, pack=1), 0)
        thread = gl.arange(0, WARPS * 32, layout=threads)
        for i in gl.static_range(2048 // (WARPS * 32)):
            entry = thread + i * WARPS * 32  # four copies of a pair at a time
            gl.inline_asm_elementwise(
                FILL, "=r,r,r", [base + entry * 16, gl.load(pairs + entry // 8)], dtype=gl.int32, is_pure=False, pack=1
            )
        all_threads()
        own = gl.inline_asm_elementwise(LANE, "=r,r", [bank], dtype=gl.int32, is_pure=True, pack=1)
        bank = base + own * 4

    # 2. The inputs.
    if PDL:
        gl.inline_asm_elementwise(WAIT_FOR_INPUTS, "=r,r", [one], dtype=gl.int32, is_pure=False, pack=1)
        for stage in gl.static_range(STAGES):
            _fetch_inputs(first + stage, end, stage, x, x_ring, rows, K, BK, BM, WARPS)
            async_copy.commit_group()

    # 3. Unit by unit.
    acc = gl.zeros([BN, BM], gl.float32, layout=mma)
    zero = gl.zeros([BN, BM], gl.float32, layout=mma)
    start = first % BLOCKS
    slot = 0
    for unit in range(first, end):
        # Scales come from loads of one unit ago; the next unit's values and the codes of the one after start now.
        scale = value * step + shift
        value = gl.load(code_values + next_code.to(gl.int32))
        step = next_step
        next_code, next_step = _fetch_scales(unit + 2, end, lane, codes, steps, K, BN, BK, by_row)
        async_copy.wait_group(STAGES - 1)
        bytes_ = w_ring.index(slot).load(packed)
        if SUB == 4:
            h0, h1 = bytes_.reshape([BN, 2, 2, 32]).permute([0, 3, 2, 1]).split()
            p0, p1 = h0.split()
            p2, p3 = h1.split()
            parts = (p0, p1, p2, p3)
        elif SUB == 2:
            p0, p1 = bytes_.reshape([BN, 2, 32]).permute([0, 2, 1]).split()
            parts = (p0, p1)
        else:
            parts = (bytes_,)
        for j in gl.static_range(SUB):
            part = gl.convert_layout(parts[j], packed, assert_trivial=True)
            even, odd = gl.inline_asm_elementwise(
                LOOK_UP if TABLE else PERMUTE,
                DECODED,
                [part, bank],
                dtype=(gl.bfloat16, gl.bfloat16),
                is_pure=True,
                pack=4,
            )
            # Byte 16v+4t+2h+n of even (odd) holds weight 32v+8t+2h+n (+4); the instruction's k is 32v+16i+8h+2t+n with
            # i = 0 for even and 1 for odd. x is permuted likewise, so each product pairs what belongs together.
            w = gl.join(even.reshape([BN, 2, 4, 2, 2]), odd.reshape([BN, 2, 4, 2, 2]))
            w = w.permute([0, 1, 5, 3, 2, 4]).reshape([BN, 64])
            xs = x_ring.index(slot * SUB + j).load(INPUT_LAYOUT).reshape([BM, 2, 4, 2, 2, 2])
            xs = xs.permute([1, 3, 4, 2, 5, 0]).reshape([64, BM])
            product = mma_v2(
                gl.convert_layout(w, left, assert_trivial=True), gl.convert_layout(xs, right, assert_trivial=True), zero
            )
            which = gl.full([BN], j, gl.int32, layout=by_row)
            block_scale = gl.inline_asm_elementwise(
                FROM_QUAD, "=r,r,r", [scale, which], dtype=gl.float32, is_pure=True, pack=1
            )
            acc += product * block_scale[:, None]
        _fetch_weights(unit + STAGES, end, slot, weight, w_ring, K, BN, BK, WARPS)
        _fetch_inputs(unit + STAGES, end, slot, x, x_ring, rows, K, BK, BM, WARPS)
        async_copy.commit_group()
        slot = gl.where(slot + 1 == STAGES, 0, slot + 1)

        # 4. The end of this thread block's share of a tile.
        stop = unit % BLOCKS + 1
        if (stop == BLOCKS) | (unit + 1 == end):
            tile = unit // BLOCKS
            n = gl.arange(0, BN, layout=by_row)
            m = gl.arange(0, BM, layout=by_column)
            done = stop - start == BLOCKS
            if not done:
                inside = n[:, None] * BM + m[None, :]
                mine = pid * 2 + (tile != first // BLOCKS).to(gl.int32)
                gl.store(partial + mine.to(gl.int64) * (BN * BM) + inside, acc)
                all_threads()
                before = gl.atomic_add(arrived + tile, stop - start, sem="acq_rel")
                done = before + (stop - start) == BLOCKS
                if done:
                    acc = zero
                    lowest = ((tile * BLOCKS + 1) * programs - 1) // UNITS
                    highest = ((tile * BLOCKS + BLOCKS) * programs - 1) // UNITS
                    for program in range(lowest, highest + 1):
                        theirs = program * 2 + (tile != (program * UNITS // programs) // BLOCKS).to(gl.int32)
                        acc += gl.load(partial + theirs.to(gl.int64) * (BN * BM) + inside, cache_modifier=".cg")
                    gl.store(arrived + tile, 0)
            if done:
                n = tile * BN + n
                if BIAS:
                    acc += gl.load(bias + n).to(gl.float32)[:, None]
                for r in gl.static_range(RANK // 16):
                    un = tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, left))
                    ur = r * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, left))
                    lm = gl.arange(0, BM, layout=gl.SliceLayout(0, right))
                    lr = r * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, right))
                    u = gl.load(up + un[:, None] * RANK + ur[None, :])
                    t = gl.load(low + lm[None, :] * RANK + lr[:, None], mask=(lm[None, :] < rows) & (lr[:, None] >= 0))
                    acc = mma_v2(u, t, acc)
                out = _activated(acc, ACTIVATION).to(gl.bfloat16)
                gl.store(y + m[None, :] * N + n[:, None], out, mask=(m[None, :] < rows) & (n[:, None] >= 0))
            acc = zero
            start = 0
    async_copy.wait_group(0)
