"""How PPO learns, not how fast it runs: score against KL, of this project's trainer and of TRL 1.12's, over seeds.

python bench/learning.py [RUN.yaml] [--variants ours trl fresh-critic FIELD=VALUE[,FIELD=VALUE] ...] [--seeds 0 1 2]
    [--set FIELD=VALUE ...] [--home FOLDER] [--out FOLDER] [--jobs N]

Each variant of each seed is trained in a process of its own. All of one seed that do not change what comes before PPO
start from the same merged model, the same reward and the same prompts, made by the stages themselves. `trl` has the
same adapter, settings and reward, normalised alike; its critic is a second model that starts from the reward, as ours
does. `fresh-critic` starts the critic from zeros. FIELD=VALUE changes the run: quantization.type=nf4,
lora.layers=top:15, ppo.normalizeReward=false. Curves go to OUT/*.json; the held-out judgement is that of the evaluate
stage: KL, the run's own reward, and the scorers that training never saw.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from chain_on_gpu import changed
from torch import Tensor, nn

from rlhf_api.canonical import sha256_of
from rlhf_api.run import RLHFRun
from rlhf_operator.local import Home, LocalRunner
from rlhf_operator.stages import chain
from rlhf_pipeline.evaluate import Bench
from rlhf_pipeline.models import device_of, load_base, load_tokenizer, lora_config
from rlhf_pipeline.ppo_trainer import ADAM_EPSILON, Trainer
from rlhf_pipeline.prompts import Prompts
from rlhf_pipeline.roles import Roles
from rlhf_pipeline.rollout import Sampling
from rlhf_pipeline.scorers import load_scorers
from rlhf_pipeline.scoring import load_score
from rlhf_pipeline.statistics import mean_of
from rlhf_store.artifacts import open_artifacts

EXAMPLE = Path(__file__).parents[1] / "manifests" / "examples" / "positive-reviews.yaml"
OURS, TRL, FRESH_CRITIC = "ours", "trl", "fresh-critic"
SMOOTHED = 4  # updates that a point of a curve is the mean of
KL_POINTS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0)  # nats a response


@dataclass(frozen=True)
class Point:
    """One update of a curve."""

    episodes: int
    seconds: float  # since the first update began
    kl: float  # nats a response
    score: float  # of the reward model, raw


@dataclass(frozen=True)
class Ground:
    """What PPO starts from: one seed's run, and the folders that its stages made."""

    run: RLHFRun
    model: Path
    reward: Path
    prompts: Path
    data: Path  # of the fitted scorers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--variants", nargs="+", default=[OURS, TRL])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of all variants")
    parser.add_argument("--home", type=Path, default=Path(".rlhf"))
    parser.add_argument("--out", type=Path, default=Path("learning"))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 1 where seconds are to be compared")
    parser.add_argument("--one", action="store_true", help="the one variant of the one seed, in this process")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        [variant], [seed] = arguments.variants, arguments.seeds
        train(arguments, variant, seed)
        return
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores", flush=True)
    for seed in arguments.seeds:  # what several variants share is made once
        prepare(arguments, OURS, seed)
    pairs = [(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(lambda pair: in_its_process(arguments, *pair), pairs):
            print(line, flush=True)
    print(summary(arguments))


def in_its_process(arguments: argparse.Namespace, variant: str, seed: int) -> str:
    """Train one variant of one seed; returns a line on it."""
    shared = [f"--{name}={getattr(arguments, name)}" for name in ("home", "out")]
    shared += [f"--set={change}" for change in arguments.set]
    command = [sys.executable, __file__, str(arguments.run), "--one", "--variants", variant, "--seeds", str(seed)]
    done = subprocess.run([*command, *shared], capture_output=True, text=True)
    if done.returncode:
        return f"{variant}, seed {seed}: failed\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    return done.stdout.strip().splitlines()[-1]


def prepare(arguments: argparse.Namespace, variant: str, seed: int) -> Ground:
    """The stages before PPO, made or found; PPO and evaluation, which a run has as well, on one batch."""
    changes = [f"seed={seed}", *arguments.set]
    if variant not in (OURS, TRL, FRESH_CRITIC):
        changes += variant.split(",")
    document = changed(yaml.safe_load(arguments.run.read_text()), changes)
    wanted = RLHFRun.model_validate(document)
    batch = wanted.spec.ppo.batch_size
    short = changed(document, [f"ppo.episodes={batch}", "evaluate.samples=2"])
    # Variants of one seed may run at a time: each has a name of its own, the same one again for the same run.
    short["metadata"] = {"name": f"learning-{sha256_of([variant, short['spec']])[:12]}"}
    run = RLHFRun.model_validate(short)
    home = Home(arguments.home)
    runner = LocalRunner(run, home.default_store(), home)
    status = runner.run(lambda *_: None)
    if status.phase != "Succeeded":
        raise SystemExit(f"{variant}, seed {seed}: {status.model_dump_json(exclude_none=True)[:2000]}")
    artifacts = open_artifacts(home.default_store())
    links = {link.name: link for link in chain(run, runner.observe().fingerprints)}
    found = links["ppo"].inputs | {"data": links["evaluate"].inputs["data"]}
    folders = {
        name: artifacts.fetch(ref, arguments.home / "learning" / ref.digest)
        for name, ref in found.items()
        if name in ("model", "reward", "prompts", "data")
    }
    return Ground(wanted, **folders)


def train(arguments: argparse.Namespace, variant: str, seed: int) -> None:
    """Train and judge; writes OUT/VARIANT-SEED.json and prints a line."""
    ground = prepare(arguments, variant, seed)
    adapter = arguments.out / f"{variant}-{seed}"
    learn = with_trl if variant == TRL else with_ours
    curve = learn(ground, adapter, fresh_critic=variant == FRESH_CRITIC)
    judged = held_out(ground, adapter)
    found = {"variant": variant, "seed": seed, "curve": [asdict(point) for point in curve], "heldOut": judged}
    (arguments.out / f"{variant}-{seed}.json").write_text(json.dumps(found, indent=1))
    rises = ", ".join(f"{name} {values['rise']:+.3f}" for name, values in judged["scores"].items())
    print(f"{variant}, seed {seed}: {curve[-1].episodes} episodes in {curve[-1].seconds:.0f} s, held out: "
          f"KL {judged['kl']:.2f}, {rises}")  # fmt: skip


def with_ours(ground: Ground, adapter: Path, *, fresh_critic: bool) -> list[Point]:
    """This project's trainer, as its stage builds it."""
    spec = ground.run.spec
    device, tokenizer = device_of(spec.gpu), load_tokenizer(ground.model)
    torch.manual_seed(spec.seed)
    roles = Roles(load_base(ground.model, spec.quantization, device), spec.lora, checkpointing=device.type == "cuda")
    score, _ = load_score(ground.reward, roles, tokenizer, spec.ppo.micro_batch_size)
    prompts = Prompts(ground.prompts, "train", tokenizer.pad_token_id, spec.seed)
    if fresh_critic:
        roles.start_critic = lambda *_: None  # type: ignore[method-assign]
    trainer = Trainer(roles, spec.ppo, score, tokenizer.eos_token_id, tokenizer.pad_token_id, spec.seed)
    curve: list[Point] = []
    begin = time.perf_counter()
    for index in range(trainer.total):
        metrics = trainer.step(*prompts.batch(index, trainer.settings.batch_size, device))
        seconds = time.perf_counter() - begin
        curve.append(Point((index + 1) * trainer.settings.batch_size, seconds, metrics["kl"], metrics["score_raw"]))
    roles.save_adapter("policy", adapter)
    return curve


def with_trl(ground: Ground, adapter: Path, **_: Any) -> list[Point]:
    """TRL's trainer on the same model, reward, prompts and settings."""
    from peft import get_peft_model
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    spec, ppo = ground.run.spec, ground.run.spec.ppo
    device, tokenizer = device_of(spec.gpu), load_tokenizer(ground.model)
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id == eos:  # it tells padding by the id
        tokenizer.pad_token_id = next(id for id in tokenizer.all_special_ids if id != eos)
    torch.manual_seed(spec.seed)
    mean, std = reference_scores(ground)
    base = load_base(ground.model, spec.quantization, device)
    policy = get_peft_model(base, lora_config(spec.lora, base, top=True))
    rows = Prompts(ground.prompts, "train", tokenizer.pad_token_id, spec.seed).rows
    curve: list[Point] = []
    begin = 0.0

    class Curve(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            raw = logs["objective/scores"] * std + mean
            curve.append(Point(int(logs["episode"]), time.perf_counter() - begin, logs["objective/kl"], raw))

    mini = ppo.effective_mini_batch_size
    settings = PPOConfig(
        output_dir=str(adapter), seed=spec.seed, use_cpu=device.type == "cpu", report_to=[], save_strategy="no",
        logging_steps=1, num_sample_generations=0, bf16=False, disable_tqdm=True, max_grad_norm=ppo.max_grad_norm,
        # Accumulating, it makes one optimiser step a batch, however many mini-batches there are.
        per_device_train_batch_size=ppo.batch_size, gradient_accumulation_steps=1,
        num_mini_batches=ppo.batch_size // mini, total_episodes=ppo.rollouts * ppo.batch_size,
        local_rollout_forward_batch_size=ppo.effective_rollout_batch_size(1), num_ppo_epochs=ppo.epochs,
        learning_rate=ppo.learning_rate, adam_epsilon=ADAM_EPSILON, weight_decay=0.0,
        lr_scheduler_type=ppo.schedule, response_length=ppo.response_tokens,
        stop_token="eos", temperature=ppo.temperature, missing_eos_penalty=ppo.missing_eos_penalty,
        kl_coef=ppo.kl_coefficient, cliprange=ppo.clip_range, cliprange_value=ppo.value_clip_range,
        vf_coef=ppo.value_coefficient, gamma=ppo.gamma, lam=ppo.gae_lambda, whiten_rewards=ppo.whiten_rewards,
    )  # fmt: skip
    trainer = PPOTrainer(
        settings, tokenizer, policy, None, Scalar(ground, mean, std, eos, trained=False),
        [{"input_ids": row} for row in rows], Scalar(ground, mean, std, None, trained=True), callbacks=[Curve()],
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.train()
    policy.save_pretrained(adapter)
    return curve


class Scalar(nn.Module):
    """What TRL takes for a reward or value model, started from the run's reward: (reward - mean) / std.

    eos: a token that does not count: what stands before it is read, as the reward stage does.
    """

    base_model_prefix = "backbone"

    def __init__(self, ground: Ground, mean: float, std: float, eos: int | None, *, trained: bool) -> None:
        super().__init__()
        spec = ground.run.spec
        roles = Roles(load_base(ground.model, spec.quantization, device_of(spec.gpu)), spec.lora)
        roles.add_reward(ground.reward)
        roles.start_critic(mean, std)
        roles.activate("critic")
        self.backbone, self.score = _Backbone(roles.model.get_decoder(), eos), roles.heads["critic"]
        self.requires_grad_(False)
        for parameter in roles.parameters("critic"):
            parameter.requires_grad_(trained)


class _Backbone(nn.Module):
    def __init__(self, decoder: nn.Module, eos: int | None) -> None:
        super().__init__()
        self.decoder, self.eos = decoder, eos

    def forward(self, input_ids: Tensor, **named: Any) -> Any:
        output = self.decoder(input_ids=input_ids, **named)
        hidden = output.last_hidden_state.float()
        if self.eos is not None:
            hidden = torch.where((input_ids == self.eos)[..., None], hidden.roll(1, dims=1), hidden)
        output.hidden_states = (hidden,)  # it reads the last of these
        return output


def reference_scores(ground: Ground) -> tuple[float, float]:
    """Mean and deviation of the reward over what the reference says to four batches of prompts."""
    bench, prompts = judging(ground, None, "train")
    size = ground.run.spec.ppo.batch_size
    rewards: list[float] = []
    for index in range(4):
        ids, mask = prompts.batch(index, size, bench.roles.device)
        rewards += bench.judge("reference", ids, mask, seed=index).rewards
    return statistics.fmean(rewards), statistics.stdev(rewards)


def held_out(ground: Ground, adapter: Path) -> dict[str, Any]:
    """Reference and trained policy on prompts that PPO never saw: KL, and by scorer both means and the rise."""
    spec = ground.run.spec
    scorers = load_scorers(spec.evaluate.scorers, ground.data)
    bench, prompts = judging(ground, adapter, "heldout")
    rows, texts = prompts.rows[: spec.evaluate.samples], prompts.texts[: spec.evaluate.samples]
    kl: list[float] = []
    scores: dict[str, dict[str, Any]] = {}
    for role in ("reference", "policy"):
        rewards: list[float] = []
        said: list[str] = []
        for start in range(0, len(rows), spec.evaluate.batch_size):
            ids, mask = prompts.padded(rows[start : start + spec.evaluate.batch_size], bench.roles.device)
            judged = bench.judge(role, ids, mask, seed=spec.seed * 1_000_003 + start)  # type: ignore[arg-type]
            rewards, said, kl = rewards + judged.rewards, said + judged.texts, kl + judged.kl
        for name, values in {"reward": rewards, **{each.name: each(texts, said) for each in scorers}}.items():
            scores.setdefault(name, {})[role] = asdict(mean_of(values))
    for values in scores.values():
        values["rise"] = values["policy"]["mean"] - values["reference"]["mean"]
    return {"kl": statistics.fmean(kl[len(rows) :]), "scores": scores}


def judging(ground: Ground, adapter: Path | None, part: str) -> tuple[Bench, Prompts]:
    """The evaluate stage's judge on raw scores, with this policy, and its prompts."""
    spec = ground.run.spec
    tokenizer = load_tokenizer(ground.model)
    roles = Roles(load_base(ground.model, spec.quantization, device_of(spec.gpu)), spec.lora, critic=False)
    if adapter:
        roles.load_adapter("policy", adapter)
    score, _ = load_score(ground.reward, roles, tokenizer, spec.ppo.micro_batch_size)
    sampling = Sampling(spec.ppo.response_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id, spec.ppo.temperature)
    bench = Bench(roles, tokenizer, score, (0.0, 1.0), sampling, spec.ppo.micro_batch_size)
    return bench, Prompts(ground.prompts, part, tokenizer.pad_token_id, spec.seed)


def summary(arguments: argparse.Namespace) -> str:
    """Held-out figures, and the training score at equal KL, of each variant: mean and range over seeds."""
    lines = ["", f"{'':34} {'held out: KL':>14} {'rises':>40} {'s':>7}"]
    curves: dict[str, list[list[Point]]] = {}
    for variant in arguments.variants:
        files = [arguments.out / f"{variant}-{seed}.json" for seed in arguments.seeds]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            continue
        curves[variant] = [[Point(**point) for point in each["curve"]] for each in found]
        judged = [each["heldOut"] for each in found]
        rises = "  ".join(
            f"{name} {spread(each['scores'][name]['rise'] for each in judged)}" for name in judged[0]["scores"]
        )
        seconds = spread(curve[-1].seconds for curve in curves[variant])
        lines.append(f"{variant:34} {spread(each['kl'] for each in judged):>14}  {rises}  {seconds}")
    lines += ["", "raw training score at KL".ljust(34) + "".join(f"{kl:>22g}" for kl in KL_POINTS)]
    for variant, several in curves.items():
        cells = []
        for kl in KL_POINTS:
            values = [value for curve in several if (value := score_at(curve, kl)) is not None]
            cells.append(f"{spread(values)} ({len(values)})" if values else "-")
        lines.append(f"{variant:34}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def score_at(curve: list[Point], kl: float) -> float | None:
    """The smoothed score where the smoothed KL first passes `kl`, linear between updates; None where it never does."""
    smooth = [
        (statistics.fmean(p.kl for p in part), statistics.fmean(p.score for p in part))
        for end in range(1, len(curve) + 1)
        for part in [curve[max(0, end - SMOOTHED) : end]]
    ]
    for (low, before), (high, after) in pairwise(smooth):
        if low <= kl < high:
            return before + (after - before) * (kl - low) / (high - low)
    return None


def spread(values: Iterable[float]) -> str:
    """Mean [least, most]."""
    found = list(values)
    return f"{statistics.fmean(found):.3g} [{min(found):.3g}, {max(found):.3g}]"


if __name__ == "__main__":
    main()
