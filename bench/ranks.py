"""Seconds a step of PPO on GPT-NeoX-20B in NF4, by the number of GPUs that share its batch.

python bench/ranks.py [--gpus 1 2] [--batch 64] [--prompt 64] [--response 128] [--layers top:11]

Figures are medians of whole steps after one to warm up; random weights and prompts; no response ends early. The rows
decoded together are the same on each GPU whatever their number, so more GPUs decode fewer such groups.
"""

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
from big_model import GIB, big_model, four_roles, keep_within

from rlhf_api.run import PPO
from rlhf_pipeline.ppo_trainer import Trainer
from rlhf_pipeline.ranks import Ranks
from rlhf_pipeline.scoring import AdapterScore

WARM_UP = 1  # the first step is slower: it compiles, and makes the optimiser's state
PROMPT_IDS = (5, 50000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt-neox-20b")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="decoded together on a GPU")
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--layers", default="top:11")
    parser.add_argument("--kept", type=int, default=4, help="layers whose activations are kept")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cap", type=float, default=23.0, help="GiB of each GPU")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), flush=True)
    seconds: dict[int, float] = {}
    for gpus in arguments.gpus:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        results = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(rank_main, (gpus, arguments, results), nprocs=gpus)  # type: ignore[no-untyped-call]
        middle = results.get()
        seconds[gpus] = middle["whole"]
        print(f"[{gpus} GPUs] {middle['whole']:.2f} s a step: rollout {middle['rollout_seconds']:.2f}, score "
              f"{middle['score_seconds']:.2f}, train {middle['train_seconds']:.2f}; peak reserved "
              f"{middle['peak']:.2f} GiB", flush=True)  # fmt: skip
    first, *others = arguments.gpus
    for gpus in others:
        print(f"[ratio] {gpus} GPUs: {seconds[first] / seconds[gpus]:.2f} times {first}", flush=True)


def rank_main(rank: int, gpus: int, arguments: argparse.Namespace, results: Any) -> None:
    """One rank: some steps; the first one tells how long they took."""
    torch.cuda.set_device(rank)
    ranks = Ranks(rank, gpus)
    if gpus > 1:
        ranks.join(gpus=True)
    keep_within(arguments.cap)
    roles = four_roles(big_model(arguments.model), arguments.layers, arguments.kept)
    settings = PPO(
        episodes=10**6, batch_size=arguments.batch, micro_batch_size=arguments.micro,
        rollout_batch_size=arguments.rows, prompt_tokens=arguments.prompt, response_tokens=arguments.response,
        epochs=arguments.epochs, missing_eos_penalty=None,
    )  # fmt: skip
    trainer = Trainer(roles, settings, AdapterScore(roles, 0, arguments.micro), eos=0, pad=1, seed=1, ranks=ranks)
    generator = torch.Generator().manual_seed(1)
    found: list[dict[str, float]] = []
    for step in range(arguments.steps + WARM_UP):
        ids = torch.randint(*PROMPT_IDS, (arguments.batch, arguments.prompt), generator=generator).cuda()
        begin = time.perf_counter()
        metrics = trainer.step(ids, torch.ones_like(ids, dtype=torch.bool))
        torch.cuda.synchronize()
        if step >= WARM_UP:
            peak = torch.cuda.max_memory_reserved() / GIB
            found.append(metrics | {"whole": time.perf_counter() - begin, "peak": peak})
    if ranks.first:
        results.put({name: statistics.median(each[name] for each in found) for name in found[0]})


if __name__ == "__main__":
    main()
