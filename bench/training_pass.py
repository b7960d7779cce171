"""Seconds, peak memory and FLOP/s of one training pass of GPT-NeoX-20B in NF4: ours against PEFT with checkpointing.

python bench/training_pass.py [--sizes 8x512 8x128 16x256] [--cap 23] [--profile]

A pass is the policy's: hidden states, log-probabilities of the second half of each sequence, backward to the adapters.
The floor is the operations of the matrix products (forward, again, and the gradient of the activations) over the rate
that an 8192-cubed product reaches on the same card in the same run. --profile: which kernels the time goes to.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from big_model import GIB, big_model, keep_within
from torch import Tensor

from rlhf_api.run import Lora
from rlhf_pipeline.losses import chunked_logprobs
from rlhf_pipeline.models import vocabulary_logits
from rlhf_pipeline.passes import fuse
from rlhf_pipeline.roles import Roles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt-neox-20b")
    parser.add_argument("--sizes", nargs="+", default=["8x512", "8x128", "16x256"])
    parser.add_argument("--kept", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--top", type=int, default=11)
    parser.add_argument("--cap", type=float, default=23.0)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--profile", action="store_true", help="of ours: milliseconds of a pass by kernel")
    arguments = parser.parse_args()
    rate = matrix_rate()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in an 8192-cubed product", flush=True)
    keep_within(arguments.cap)
    peer = {} if arguments.skip_peer else peft_passes(big_model(arguments.model), arguments.sizes)
    gc.collect()
    torch.cuda.empty_cache()
    for layers, kept in [("all", kept) for kept in arguments.kept] + [(f"top:{arguments.top}", arguments.top)]:
        base = big_model(arguments.model)
        fuse(base)  # as `load_base` does
        roles = Roles(base, Lora(rank=16, alpha=32, layers=layers), critic=False, checkpointing=True, kept_layers=kept)
        for size in arguments.sizes:
            ids, mask = batch(size)
            trunk = roles.trunk(ids, mask)
            half = ids.shape[1] // 2

            def one(roles: Any = roles, trunk: Any = trunk, ids: Tensor = ids, half: int = half) -> None:
                hidden = roles.hidden("policy", trunk)[:, half - 1 : -1]
                chunked_logprobs(hidden, ids[:, half:], roles.logits, 1.0).mean().backward()

            seconds, peak = measured(one, roles.parameters("policy"))
            share = int(layers.removeprefix("top:")) / len(roles.stack.layers) if layers != "all" else 1.0
            floor = operations(
                base, ids.numel(), share, recomputed=1 - min(1.0, kept / len(roles.stack.layers) / share)
            )
            line = f"[pass] {size} {layers}, {kept} layers kept: {seconds:.3f} s, peak reserved {peak:.2f} GiB, "
            line += f"{floor / seconds / 1e12:.0f} TFLOP/s, {floor / rate / seconds:.0%} of the card's"
            if size in peer:
                line += f"; PEFT {peer[size]:.3f} s, ratio {peer[size] / seconds:.2f}"
            print(line, flush=True)
            if arguments.profile:
                print(profiled(one), flush=True)
        del roles, base, one, trunk
        gc.collect()
        torch.cuda.empty_cache()


def peft_passes(base: Any, sizes: list[str]) -> dict[str, float]:
    """Seconds of a pass of PEFT's own layers under transformers' checkpointing."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=["query_key_value", "dense"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    found: dict[str, float] = {}
    for size in sizes:
        ids, mask = batch(size)
        half = ids.shape[1] // 2

        def one(ids: Tensor = ids, mask: Tensor = mask, half: int = half) -> None:
            hidden = base.get_decoder()(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            logits: Callable[[Tensor], Tensor] = lambda h: vocabulary_logits(base, h)  # noqa: E731
            chunked_logprobs(hidden[:, half - 1 : -1], ids[:, half:], logits, 1.0).mean().backward()

        found[size], peak = measured(one, parameters)
        print(f"[peft] {size} all, checkpointing: {found[size]:.3f} s, peak reserved {peak:.2f} GiB", flush=True)
    return found


def batch(size: str) -> tuple[Tensor, Tensor]:
    """Random ids of rows x tokens, the first row padded on the left."""
    rows, tokens = map(int, size.split("x"))
    ids = torch.randint(5, 50000, (rows, tokens), device="cuda")
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, : tokens // 8] = False
    return ids, mask


def measured(work: Callable[[], None], parameters: list[Any]) -> tuple[float, float]:
    """Median seconds of five and the peak of reserved memory in GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        for parameter in parameters:
            parameter.grad = None
    return statistics.median(times[2:]), torch.cuda.max_memory_reserved() / GIB


def profiled(work: Callable[[], None], most: int = 24) -> str:
    """The kernels that a pass spends most time in: milliseconds, launches, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in kernels)
    lines = [
        f"  {each.self_device_time_total / 1e3:9.2f} ms {each.count:6d} x  {each.key[:150]}" for each in kernels[:most]
    ]
    return "\n".join([*lines, f"  {total / 1e3:9.2f} ms in all kernels"])


def operations(model: Any, tokens: int, share: float, recomputed: float) -> float:
    """Floating-point operations of the layers' matrix products in a pass: forward, again where recomputed, gradient."""
    weights = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "compute_dtype"))
    return 2 * weights * share * tokens * (2 + recomputed)


def matrix_rate() -> float:
    """Operations a second of a large bfloat16 product of random values."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
