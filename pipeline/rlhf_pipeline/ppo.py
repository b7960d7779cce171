"""The ppo stage: aligns the policy adapter, and can be stopped and resumed between any two rollouts."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_api.errors import TrainingError, UserError
from rlhf_pipeline.models import device_of, load_base, load_tokenizer
from rlhf_pipeline.ppo_trainer import Running, Trainer
from rlhf_pipeline.prompts import Prompts
from rlhf_pipeline.reward_models import RewardCard
from rlhf_pipeline.roles import Roles
from rlhf_pipeline.scoring import load_score, texts_of
from rlhf_pipeline.stage_process import Interrupted, Stage

SAMPLES_LOGGED = 4  # generations kept each ppo.sampleSteps rollouts


def run(stage: Stage) -> dict[str, float]:
    """Train the policy; write adapter/, critic/, samples.jsonl and report.json. Returns the last rollout's figures."""
    settings = stage.settings.ppo
    lora, quantization = stage.settings.lora, stage.settings.quantization
    if settings is None or lora is None or quantization is None:
        raise UserError("stage.settings: ppo needs the sections ppo, lora and quantization")

    # 1. One base, four roles.
    stage.progress.update(phase="loading")
    device = device_of(stage.config.gpu, stage.ranks.rank)
    folder = stage.input("model")
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(stage.settings.seed)  # of the adapters' first weights
    roles = Roles(load_base(folder, quantization, device), lora, checkpointing=device.type == "cuda")
    score, card = load_score(stage.input("reward"), roles, tokenizer, settings.micro_batch_size)
    prompts = Prompts(stage.input("prompts"), "train", tokenizer.pad_token_id, stage.settings.seed)
    eos, pad, seed = tokenizer.eos_token_id, tokenizer.pad_token_id, stage.settings.seed
    trainer = Trainer(roles, settings, score, eos, pad, seed, ranks=stage.ranks)

    # 2. Go on where an earlier process stopped.
    last_good = _resume(stage, trainer)

    # 3. Rollouts.
    metrics: dict[str, float] = {}
    while trainer.running.rollouts < trainer.total:
        index = trainer.running.rollouts
        if stage.all_stopping():
            _save_checkpoint(stage, trainer)
            raise Interrupted
        ids, mask = prompts.batch(index, settings.batch_size, device)
        stage.progress.update(step=index, total=trainer.total, phase="training")
        try:
            metrics = trainer.step(ids, mask)
            _check_sound(metrics, settings.abort_kl, index + 1)
        except TrainingError as error:
            raise TrainingError(f"{error}; last good checkpoint: {last_good or 'none'}") from error
        if device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
        stage.log(index + 1, **metrics)
        too_far = settings.max_kl is not None and metrics["kl"] > settings.max_kl
        last = too_far or index + 1 == trainer.total
        if last or index % settings.sample_steps == 0:
            trainer.running.samples += _samples(trainer, tokenizer, index + 1)
        shown = {key: metrics[key] for key in ("reward", "score", "kl", "entropy", "tokens_per_second")}
        stage.progress.update(step=index + 1, total=trainer.total, phase="training", **shown)
        if last:
            break
        if (index + 1) % settings.checkpoint_steps == 0:
            last_good = _save_checkpoint(stage, trainer)

    # 4. The artifact.
    stage.progress.update(phase="saving")
    return _write(stage, trainer, card)


def _check_sound(metrics: dict[str, float], abort_kl: float, rollout: int) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(f"ppo: {name} is {value} in rollout {rollout}")
    if abs(metrics["kl"]) > abort_kl:
        raise TrainingError(
            f"ppo: the KL to the reference is {metrics['kl']:.3g} nats a response in rollout {rollout}, above "
            f"ppo.abortKl {abort_kl:g}; lower ppo.learningRate or raise ppo.klCoefficient"
        )


def _samples(trainer: Trainer, tokenizer: Any, rollout: int) -> list[dict[str, Any]]:
    last = trainer.last
    prompts, answers = texts_of(tokenizer, last.responses)
    return [
        {"rollout": rollout, "prompt": prompt, "response": answer, "score": score, "kl": kl}
        for prompt, answer, score, kl in zip(
            prompts[:SAMPLES_LOGGED], answers[:SAMPLES_LOGGED], last.score.tolist(), last.kl.tolist(), strict=False
        )
    ]


def _save_checkpoint(stage: Stage, trainer: Trainer) -> str:
    folder = stage.work / "checkpoint"
    if stage.ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(trainer.state(), folder / "trainer.pt")
        (folder / "running.json").write_text(json.dumps(asdict(trainer.running)))
    stage.checkpoints.save(trainer.running.rollouts, folder)
    return f"rollout {trainer.running.rollouts}"


def _resume(stage: Stage, trainer: Trainer) -> str | None:
    found = stage.checkpoints.latest()
    if found is None:
        return None
    step, folder = found
    trainer.running = Running(**json.loads((folder / "running.json").read_text()))
    trainer.load_state(torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True))
    return f"rollout {step}"


def _write(stage: Stage, trainer: Trainer, card: RewardCard) -> dict[str, float]:
    roles, running = trainer.roles, trainer.running
    roles.save_adapter("policy", stage.output / "adapter")
    roles.save_adapter("critic", stage.output / "critic" / "adapter")
    _save_head(roles, stage.output / "critic" / "head.safetensors")
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in running.samples]
    (stage.output / "samples.jsonl").write_text("".join(line + "\n" for line in lines))
    last = trainer.last.figures
    report: dict[str, Any] = {
        "rollouts": running.rollouts,
        "episodes": running.rollouts * trainer.settings.batch_size,
        "kl_coefficient": running.kl_coefficient,
        "score_mean": running.score_mean,
        "score_std": running.score_std,
        "reward_kind": card.type,
        "shared_trunk_layers": roles.bottom,
        "layers": len(roles.stack.layers),
        "trainable_parameters": sum(p.numel() for role in ("policy", "critic") for p in roles.parameters(role)),
        "last": last,
    }
    (stage.output / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True))
    return {"rollouts": float(running.rollouts)} | last


def _save_head(roles: Roles, path: Path) -> None:
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {name: t.detach().cpu() for name, t in roles.heads["critic"].state_dict().items()}
    save_file(state, path)
