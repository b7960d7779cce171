"""Episodes a second of PPO on GPT-NeoX-20B in NF4: this project's trainer against TRL 1.12's, side by side in one run.

python bench/ppo.py [--sizes 8:64:64 16:128:128] [--layers top:11 all] [--peer 160m 20b none] [--epochs 1 4]

Ours: policy, critic and reward as adapters of rank 16 on one 20B base. TRL's: the same base and policy adapter; its
value and reward models are separate, of 160M weights or, uncapped, of 20B. Both within --cap GiB unless the peer's are
of 20B. Figures are medians of whole updates after one to warm up; random weights and prompts; no response ends early.
"""

import argparse
import gc
import statistics
import tempfile
import time
from typing import Any

import torch
from big_model import GIB, big_classifier, big_model, four_roles, keep_within, plain_tokenizer

from rlhf_api.run import PPO
from rlhf_pipeline.passes.rotary import unfuse_rotary
from rlhf_pipeline.ppo_trainer import Trainer
from rlhf_pipeline.scoring import AdapterScore

WARM_UP = 1  # the first update is slower: it compiles, and makes the optimiser's state
PROMPT_IDS = (5, 50000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt-neox-20b")
    parser.add_argument("--sizes", nargs="+", default=["8:64:64", "16:128:128"], help="prompts:prompt:response")
    parser.add_argument("--layers", nargs="*", default=["top:11", "all"])
    parser.add_argument("--peer", nargs="+", default=["160m"], choices=["160m", "20b", "none"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--kept", type=int, default=11, help="layers of ours whose activations are kept")
    parser.add_argument("--micro", type=int, default=0, help="micro-batch of ours; 0: the whole batch")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's from the start, not only if it has to")
    parser.add_argument("--cap", type=float, default=23.0)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), flush=True)
    ours: dict[tuple[str, str, int], float] = {}
    keep_within(arguments.cap)
    for layers in arguments.layers:
        with_roles(arguments, layers, ours)
    for peer in arguments.peer:
        if peer == "none":
            continue
        keep_within(arguments.cap if peer == "160m" else 1e9)
        for size in arguments.sizes:
            for epochs in arguments.epochs:
                # Its trainer leaves checkpointing off whatever its config says: a person switches it on to make it fit.
                rate = None if arguments.checkpointing else trl(arguments, size, epochs, peer)
                rate = rate or trl(arguments, size, epochs, peer, checkpointing=True)
                for layers in arguments.layers:
                    if rate and (layers, size, epochs) in ours:
                        times = ours[layers, size, epochs] / rate
                        print(f"[ratio] {size}, {epochs} epochs, {layers}: {times:.2f} times TRL's {peer}", flush=True)


def with_roles(arguments: argparse.Namespace, layers: str, rates: dict[tuple[str, str, int], float]) -> None:
    """Measure ours with the adapters on these layers, at every size."""
    base = big_model(arguments.model)
    roles = four_roles(base, layers, arguments.kept)
    for size in arguments.sizes:
        prompts, prompt, response = map(int, size.split(":"))
        for epochs in arguments.epochs:
            micro = arguments.micro or prompts
            settings = PPO(
                episodes=10**6, batch_size=prompts, micro_batch_size=micro, prompt_tokens=prompt,
                response_tokens=response, epochs=epochs, missing_eos_penalty=None,
            )  # fmt: skip
            trainer = Trainer(roles, settings, AdapterScore(roles, 0, micro), eos=0, pad=1, seed=1)
            found: list[dict[str, float]] = []
            try:
                for update in range(arguments.updates + WARM_UP):
                    torch.cuda.reset_peak_memory_stats()
                    ids = torch.randint(*PROMPT_IDS, (prompts, prompt), device="cuda")
                    begin = time.perf_counter()
                    metrics = trainer.step(ids, torch.ones_like(ids, dtype=torch.bool))
                    torch.cuda.synchronize()
                    metrics["whole"] = time.perf_counter() - begin
                    metrics["peak"] = torch.cuda.max_memory_reserved() / GIB
                    if update >= WARM_UP:
                        found.append(metrics)
            except torch.OutOfMemoryError as error:
                print(f"[ours] {layers} {size} {epochs} epochs: out of memory ({str(error)[:80]})", flush=True)
                found.clear()
            if not found:  # after the exception, which holds on to the tensors of its frames
                del trainer
                roles.model.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
            rates[layers, size, epochs] = prompts / middle["whole"]
            print(f"[ours] {layers} {size} {epochs} epochs: {prompts / middle['whole']:.2f} episodes/s, "
                  f"{middle['whole']:.3f} s an update: rollout {middle['rollout_seconds']:.3f}, score "
                  f"{middle['score_seconds']:.3f}, train {middle['train_seconds']:.3f}; peak reserved "
                  f"{max(each['peak'] for each in found):.2f} GiB; {middle['response_tokens']:.0f} tokens a response",
                  flush=True)  # fmt: skip
            trainer = None  # type: ignore[assignment]
    del roles, base
    gc.collect()
    torch.cuda.empty_cache()


def trl(
    arguments: argparse.Namespace, size: str, epochs: int, peer: str, *, checkpointing: bool = False
) -> float | None:
    """Measure TRL's trainer; returns its episodes a second, None where it runs out of memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    prompts, prompt, response = map(int, size.split(":"))
    config = {"r": 16, "lora_alpha": 32, "target_modules": ["query_key_value", "dense"]}
    model = big_model(arguments.model)
    unfuse_rotary(model)
    policy = get_peft_model(model, LoraConfig(**config, task_type="CAUSAL_LM"))
    if checkpointing:
        policy.enable_input_require_grads()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    how = f"{size} {epochs} epochs, value and reward of {peer}{', checkpointing' if checkpointing else ''}"
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    updates = arguments.updates + WARM_UP
    rows = torch.randint(*PROMPT_IDS, (prompts * updates, prompt)).tolist()
    with tempfile.TemporaryDirectory() as name:
        settings = PPOConfig(
            output_dir=name, per_device_train_batch_size=prompts, gradient_accumulation_steps=1, num_mini_batches=1,
            num_ppo_epochs=epochs, total_episodes=prompts * updates, response_length=response, temperature=1.0,
            local_rollout_forward_batch_size=prompts, num_sample_generations=0, bf16=True, report_to=[],
            save_strategy="no", gradient_checkpointing=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            settings, plain_tokenizer(), policy, None, scorer(arguments, peer, trained=False),
            [{"input_ids": row} for row in rows], scorer(arguments, peer, trained=True), callbacks=[Clock()],
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        rate = None
        try:
            trainer.train()
            seconds = statistics.median(b - a for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False))
            rate = prompts / seconds
            print(f"[trl] {how}: {rate:.2f} episodes/s, {seconds:.3f} s an update; peak reserved "
                  f"{torch.cuda.max_memory_reserved() / GIB:.2f} GiB", flush=True)  # fmt: skip
        except torch.OutOfMemoryError as error:
            print(f"[trl] {how}: out of memory ({str(error)[:80]})", flush=True)
    del trainer, policy, model
    gc.collect()
    torch.cuda.empty_cache()
    return rate


def scorer(arguments: argparse.Namespace, peer: str, *, trained: bool) -> Any:
    """A sequence classifier with one output for TRL: of 160M weights in bfloat16, or the 20B base with an adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    if peer != "20b":
        return big_classifier("pythia-160m", "none").requires_grad_(trained)
    model = big_classifier(arguments.model)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=["query_key_value", "dense"])
    inject_adapter_in_model(adapter, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained and ("lora_" in name or name.startswith("score")))
    return model


if __name__ == "__main__":
    main()
