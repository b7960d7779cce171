"""Run by test_passes.py with TRITON_INTERPRET=1: the kernels of whole passes against transformers and bitsandbytes."""

import bitsandbytes.functional as bnb
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from rlhf_pipeline.nf4_weight import Nf4Weight
from rlhf_pipeline.passes import rotary as passes
from rlhf_pipeline.passes.four_bit import dequantised
from rlhf_pipeline.passes.rotary import rotated


def rotary() -> None:
    for own, rotary, heads, key_heads in ((modeling_gpt_neox, 6, 5, 5), (modeling_llama, 24, 18, 2)):
        angles = torch.randn(3, 7, rotary // 2)
        cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
        found = []
        for rotate in (own.apply_rotary_pos_emb, rotated):
            torch.manual_seed(1)
            # As they come out of one product: heads behind tokens, query, key and value of a head beside each other.
            query, key = (torch.randn(3, 7, n, 72, requires_grad=True) for n in (heads, key_heads))
            q, k = rotate(query.transpose(1, 2)[..., 24:48], key.transpose(1, 2)[..., 48:], cos, sin)
            gradients = torch.autograd.grad([q, k], [query, key], [torch.randn(q.shape), torch.randn(k.shape)])
            found.append((q, k, *gradients))
        for ours, expected in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def attention() -> None:
    """GPT-NeoX's attention with the kernel, a cache and a mask, against its own."""
    passes._is_known = lambda *_: True  # type: ignore[attr-defined,assignment]
    config = GPTNeoXConfig(
        hidden_size=72, num_attention_heads=3, num_hidden_layers=2, intermediate_size=96, vocab_size=50,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()
    ids, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    found = []
    for fused in (False, True):
        if fused:
            passes.fuse_rotary(model)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=embedded, attention_mask=mask, use_cache=True)
        output.logits[mask.bool()].pow(2).sum().backward()
        layer = output.past_key_values.layers[1]
        found.append((output.logits[mask.bool()], embedded.grad, layer.keys, layer.values))
    assert all("forward" in layer.attention.__dict__ for layer in model.gpt_neox.layers)
    for ours, own in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def dequantise() -> None:
    out, inner = 192, 320
    weight = torch.randn(out, inner, dtype=torch.bfloat16) * 0.02
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    second = state.state2
    ours = Nf4Weight(packed, state.absmax, second.absmax, second.code, state.offset, state.code, (out, inner))
    state.dtype = torch.float32  # the interpreter cuts off what does not fit into bfloat16, a card rounds
    assert torch.equal(dequantised(ours, torch.float32), bnb.dequantize_4bit(packed, state))


if __name__ == "__main__":
    torch.manual_seed(0)
    for check in (rotary, attention, dequantise):
        check()
        print(check.__name__)
