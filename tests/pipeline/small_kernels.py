"""Run by test_decode.py with TRITON_INTERPRET=1: a decode step's small kernels against plain torch, and whole steps,
with the trunk that they keep, against the model's own forward, in float32 on a CPU.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny import EOS, PAD, VOCABULARY, build_tiny_model
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from rlhf_api.run import Lora, Quantization
from rlhf_pipeline.decode import decoder as decoders
from rlhf_pipeline.decode.step_kernels import add_norm_kernel, attend_kernel, gated_kernel, low_rank_kernel
from rlhf_pipeline.models import load_base
from rlhf_pipeline.roles import Roles
from rlhf_pipeline.rollout import Sampling, _Decoder


def close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def add_norm() -> None:
    x, a, b, w, c, w2, c2 = (torch.randn(5, 48) if i < 3 else torch.randn(48) for i in range(7))
    total, y, y2 = (torch.full_like(x, torch.nan) for _ in range(3))
    add_norm_kernel[(5,)](x, a, b, total, w, c, y, w2, c2, y2, 1e-5, 48, 64, 2, False, True, True, False)
    close(total, x + a + b, "sum")
    close(y, layer_norm(x + a + b, (48,), w, c), "layer norm")
    close(y2, layer_norm(x + a + b, (48,), w2, c2), "second layer norm")
    add_norm_kernel[(5,)](x, a, b, total, w, c, y, w2, c2, y2, 1e-5, 48, 64, 1, True, False, False, False)
    close(y, (x + a) * torch.rsqrt((x + a).pow(2).mean(-1, keepdim=True) + 1e-5) * w, "RMS norm")


def attend() -> None:
    rows, heads, group, size, rotary, slots = 3, 4, 2, 24, 16, 40
    q = torch.randn(rows, heads, size)
    k, v = (torch.randn(rows, heads // group, size) for _ in range(2))
    keys, values = (torch.randn(rows, heads // group, slots, size) for _ in range(2))
    first, slot = torch.tensor([0, 5, 30], dtype=torch.int32), torch.tensor([33, 6, 30], dtype=torch.int32)
    angle = torch.arange(slots)[:, None] / 100 ** (torch.arange(rotary // 2) / (rotary // 2))
    cos, sin = (f(torch.cat([angle, angle], -1)).contiguous() for f in (torch.cos, torch.sin))
    out = torch.full((rows, heads, size), torch.nan)
    before = keys.clone()
    attend_kernel[(rows, heads)](
        q, k, v, keys, values, out, first, slot, cos, sin, out, out, 0.0, 0.3,
        q.stride(0), size, k.stride(0), size, v.stride(0), size, keys.stride(0), keys.stride(1),
        heads, group, size, 32, rotary, False, 16, False,
    )  # fmt: skip

    def rotated(h: Tensor, row: int) -> Tensor:
        at = int(slot[row] - first[row])
        turned, plain = h[..., :rotary], h[..., rotary:]
        half = torch.cat([-turned[..., rotary // 2 :], turned[..., : rotary // 2]], -1)
        return torch.cat([turned * cos[at] + half * sin[at], plain], -1)

    for row in range(rows):
        begin, end = int(first[row]), int(slot[row])
        close(keys[row, :, end], rotated(k[row], row), "key in the cache")
        close(values[row, :, end], v[row], "value in the cache")
        past = torch.cat([keys[row, :, begin : end + 1]]).repeat_interleave(group, 0)
        seen = values[row, :, begin : end + 1].repeat_interleave(group, 0)
        expected = scaled_dot_product_attention(rotated(q[row], row)[:, None], past, seen, scale=0.3)[:, 0]
        close(out[row], expected, "attention")
        untouched = torch.arange(slots) != end
        close(keys[row][:, untouched], before[row][:, untouched], "rest of the cache")


def low_rank() -> None:
    x, down = torch.randn(5, 200), torch.randn(16, 200)
    low = torch.full((5, 16), torch.nan)
    low_rank_kernel[(5, 4)](x, down, low, 200, 16, 4, 64, False)
    close(low, x @ down.T, "low rank")


def gated() -> None:
    gate, up = torch.randn(3, 100), torch.randn(3, 100)
    out = torch.full_like(gate, torch.nan)
    gated_kernel[(3, 2)](gate, up, out, 100, 64, False)
    close(out, gate * up, "gate")


def steps() -> None:
    decoders._unfit = lambda _: None  # type: ignore[attr-defined,assignment]
    for family in ("gpt_neox", "llama", "qwen2", "qwen3"):
        with tempfile.TemporaryDirectory() as folder:
            path = build_tiny_model(Path(folder), family, hidden=64)  # type: ignore[arg-type]
            model = load_base(path, Quantization(type="none"), torch.device("cpu"))
        torch.manual_seed(0)
        roles = Roles(model, Lora(rank=4, layers="top:2", target_modules="all-linear"), critic=False)
        for parameter in roles.parameters("policy"):
            parameter.data.normal_(0, 0.1)
        roles.activate("policy")
        ids = torch.randint(2, VOCABULARY, (5, 9))
        mask = torch.arange(9)[None] >= (torch.arange(5) % 8)[:, None]
        ids = ids.masked_fill(~mask, PAD)
        with torch.no_grad():
            whole(roles, _Decoder(model, ids, mask, Sampling(6, EOS, PAD, temperature=0), roles.bottom), family)


def whole(roles: Roles, ours: Any, family: str) -> None:
    """Six tokens by fused steps, each held against the model's own; then the trunk against the layers below."""
    seen = ours._prefill()
    ours.fused = decoders.decoder_of(ours.model)
    assert ours.fused, family
    ours.fused.prepare(len(ours.ids))
    ours.session.keys = [layer.keys for layer in ours.cache.layers]
    ours.session.values = [layer.values for layer in ours.cache.layers]
    ours.session.trunk = seen.new_zeros(*ours.real.shape, seen.shape[-1])
    ours.session.trunk[:, : ours.ids.shape[1]] = seen
    ours.session.trunk_layers = roles.bottom
    for _ in range(5):
        restore = ours._keep()
        own = ours._own_logits()
        restore()
        fused = ours.fused.step(ours.token[:, 0], ours.session)
        torch.testing.assert_close(fused, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))
        restore()
        ours._own_logits()  # so that its own cache and mask move on, too
        ours._step()
    ours.fused.step(ours.token[:, 0], ours.session, trunk_only=True)
    sequence = torch.cat([ours.ids, ours.out], 1)
    real = torch.cat([ours.prompt_mask, ours.out >= 0], 1)
    expected = roles.trunk(sequence, real).hidden
    assert expected is not None
    torch.testing.assert_close(ours.session.trunk[real], expected[real], rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    torch.manual_seed(0)
    logging.disable()
    for check in (add_norm, attend, low_rank, gated, steps):
        check()
        print(check.__name__)
