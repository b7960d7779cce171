"""Tokens a second of GPT-NeoX-20B in NF4 while a rollout decodes: our step, the model's own forward with and without a
CUDA graph, all in one process within 23 GiB; and the 4-bit products alone against bitsandbytes'.

python bench/decode.py [--model gpt-neox-20b] [--rows 1 8 32] [--layers top:11 all] [--products]
"""

import argparse
import time
from typing import Any

import torch
from big_model import GIB, big_model, keep_within

from rlhf_api.run import Lora
from rlhf_pipeline import rollout as rollouts
from rlhf_pipeline.decode.decoder import TIMED_LAYERS, decoder_of
from rlhf_pipeline.roles import Roles
from rlhf_pipeline.rollout import Sampling, _Decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt-neox-20b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--layers", nargs="+", default=["top:11", "all"])
    parser.add_argument("--cap", type=float, default=23.0)
    parser.add_argument("--products", action="store_true", help="time every tile of every shape too")
    parser.add_argument("--skip-own", action="store_true", help="leave the model's own forward out")
    arguments = parser.parse_args()
    keep_within(arguments.cap)
    begin = time.perf_counter()
    model = big_model(arguments.model)
    print(f"{torch.cuda.get_device_name()}; {arguments.model}, made in {time.perf_counter() - begin:.0f} s; "
          f"{torch.cuda.memory_allocated() / GIB:.2f} GiB", flush=True)  # fmt: skip
    if arguments.products:
        products(model)
    for layers in arguments.layers:
        lora = Lora(rank=16, alpha=32, layers=layers)
        roles = Roles(big_model(arguments.model) if layers != arguments.layers[0] else model, lora, critic=False)
        randomise(roles)
        roles.activate("policy")
        for rows in arguments.rows:
            compare(roles.model, rows, arguments, layers)
        del roles
        model = None
        torch.cuda.empty_cache()


def randomise(roles: Roles) -> None:
    """Give the policy an update that is not zero."""
    for parameter in roles.parameters("policy"):
        parameter.data.normal_(0, 0.02)


def compare(model: Any, rows: int, arguments: argparse.Namespace, layers: str) -> None:
    """Decode `rows` prompts in each way and print milliseconds a step."""
    torch.manual_seed(1)
    prompt, response = arguments.prompt, arguments.response
    ids = torch.randint(5, 50000, (rows, prompt), device="cuda")
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, : prompt // 4] = False
    sampling = Sampling(response, eos=0, pad=1)
    ways = {"fused": (True, True), "own, graph": (False, True), "own": (False, False)}
    found: dict[str, float] = {}
    for way, (fused, graph) in ways.items():
        if way != "fused" and (arguments.skip_own or (way == "own" and rows not in (8, 32))):
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        kept = rollouts.decoder_of
        try:
            if not fused:
                rollouts.decoder_of = lambda _: None
            with torch.no_grad():
                decoder = _Decoder(model, ids, mask, sampling)
                begin = time.perf_counter()
                decoder._prefill()
                torch.cuda.synchronize()
                prefill = time.perf_counter() - begin
                begin = time.perf_counter()
                decoder.fused = decoder._fused() if fused else None
                torch.cuda.synchronize()
                ready = time.perf_counter() - begin
                begin = time.perf_counter()
                step = decoder._captured() if graph else decoder._step
                torch.cuda.synchronize()
                capture = time.perf_counter() - begin
                steps = response - 1 if graph else 16
                begin = time.perf_counter()
                for _ in range(steps):
                    step()
                torch.cuda.synchronize()
                found[way] = 1e3 * (time.perf_counter() - begin) / steps
        finally:
            rollouts.decoder_of = kept
        rate = 1e3 * rows / found[way]
        print(f"[decode] {layers} rows={rows} {way}: {found[way]:.2f} ms a step, {rate:.0f} tokens/s; "
              f"prefill {prefill:.3f} s, ready {ready:.2f} s, capture {capture:.2f} s, "
              f"peak reserved {torch.cuda.max_memory_reserved() / GIB:.2f} GiB"
              f"{'' if not fused else f', fused={decoder.fused is not None}'}", flush=True)  # fmt: skip
        del decoder, step
    if fused := found.get("fused"):
        ratios = ", ".join(f"{way} / fused {ms / fused:.2f}" for way, ms in found.items() if way != "fused")
        print(f"[ratio] {layers} rows={rows}: {ratios}", flush=True)


def products(model: Any) -> None:
    """Time of each tile for each shape of the model's 4-bit weights, and the layers' own; and of all in a step."""
    decoder = decoder_of(model)
    assert decoder
    for rows in (1, 8, 16, 32, 64):
        decoder.prepare(rows)
        linears = decoder.linears()
        total = {"ours": 0.0, "own": 0.0}
        for (shape, padded), choice in decoder.choices.items():
            if padded != decoder.prepared:
                continue
            count = sum((linear.out, linear.inner) == shape for linear in linears)
            timed = min(count, TIMED_LAYERS)
            for tile, seconds in choice.tiles.items():
                each = seconds / timed
                print(f"[tile] rows={padded} {shape} {tile}: {1e6 * each:.1f} us, "
                      f"{shape[0] * shape[1] / 2 / each / 1e9:.0f} GB/s")  # fmt: skip
            for reason in choice.refused:
                print(f"[refused] rows={padded} {shape} {reason}")
            own = 1e3 * choice.own / timed
            best = 1e3 * min(choice.tiles.values(), default=choice.own) / timed
            print(f"[product] rows={padded} {shape}: {1e3 * best:.1f} us with {choice.best}; own {1e3 * own:.1f} us")
            total["ours"] += best * count
            total["own"] += own * count
        ours, own = total["ours"], total["own"]
        print(f"[products] rows={rows}: {ours:.2f} ms a step, the layers' own {own:.2f}, ratio {own / ours:.2f}")


if __name__ == "__main__":
    main()
