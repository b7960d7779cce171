"""The page: records in, one self-contained HTML document out."""

import datetime
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_api.budget import ModelShape, Phase, budget
from rlhf_api.cards import card_named
from rlhf_api.estimate import estimate
from rlhf_api.run import RunSpec
from rlhf_pipeline.report.charts import Interval, axis, histogram, intervals, number
from rlhf_pipeline.report.curves import Figure, figures
from rlhf_pipeline.report.records import Record, ancestors, read_folder
from rlhf_pipeline.report.verdict import verdict
from rlhf_pipeline.stage_process import Stage, surroundings

REPORT_PAGE = "logs/report.html"
NAMES = ("SFT", "PPO")  # what the page calls the reference and the policy
GENERATIONS_SHOWN = 12
EXTREMES_SHOWN = 4
HERE = Path(__file__).parent
GIB = 2**30


def write_stage_report(stage: Stage, began: float | None = None) -> Path:
    """Write the page of a running evaluate stage into its output; returns its path.

    began: time.monotonic() at the stage's start, for its own line in the timings.
    """
    records = ancestors(stage.artifacts, stage.config.inputs.values(), stage.work / "report")
    own = {
        **surroundings(),
        "config": stage.config.model_dump(mode="json", by_alias=True, exclude_none=True),
        "inputs": {name: str(ref) for name, ref in stage.config.inputs.items()},
    }
    if began is not None:
        own["seconds"] = time.monotonic() - began
    now = time.time()
    records.append(
        Record(stage.config.stage, str(stage.config.output), metadata=own, created_at=now, **read_folder(stage.output))
    )
    page = stage.output / REPORT_PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(stage.config.run.name, records, now), encoding="utf-8")
    return page


def render(run: str, records: Sequence[Record], made_at: float) -> str:
    """The page about `run`. Sections without data are left out. made_at: Unix time.

    Every text that a model, a data set or a person wrote is escaped; the page names no address and loads nothing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": short, "duration": duration, "size": size, "percent": percent}
    stages = {record.stage: record for record in records}
    evaluation = stages.get("evaluate")
    return environment.get_template("page.html.j2").render(
        run=run,
        made=datetime.datetime.fromtimestamp(made_at, datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        names=NAMES,
        stages=stages,
        evaluation=evaluation.report if evaluation else {},
        verdict=verdict(evaluation.report) if evaluation and evaluation.report else None,
        comparisons=comparisons(evaluation.report) if evaluation and evaluation.report else [],
        win_rates=win_rates(evaluation.report) if evaluation and evaluation.report else None,
        histograms=histograms(evaluation) if evaluation else [],
        generations=chosen_generations(evaluation.generations) if evaluation else [],
        training={name: figures(stages[name]) for name in ("ppo", "reward", "sft") if name in stages},
        samples=stages["ppo"].samples[-24:] if "ppo" in stages else [],
        rows=stage_rows(records),
        gpu_memory=gpu_memory(records),
        memory=memory_rows(records),
        times=time_rows(records),
        settings=settings_text(records),
        versions=versions(records),
        records=records,
    )


def comparisons(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reward and every scorer: before, after, rise, win rate, and what the scorer is."""
    scaled = (report["score_mean"], report["score_std"]) != (0.0, 1.0)
    about = "the run's reward" + (", in standard deviations of the SFT policy's responses" if scaled else "")
    rows = [{"name": "reward", "about": about, **report["reward"]}]
    for name, scored in report["scorers"].items():
        if scored["type"] == "fitted":
            about = (
                f"classifier fitted on {scored['fitted_on']:,} labelled texts, right on "
                f"{percent(scored['accuracy'])} of {scored['held_out']:,} held-out ones"
            )
        else:
            about = scored["function"]
        rows.append({"name": name, "about": about, **scored})
    return rows


def win_rates(report: dict[str, Any]) -> Figure:
    """How often the PPO policy beats the SFT policy on the same prompt."""
    rates = {"reward": report["reward"]["win_rate"]} | {n: s["win_rate"] for n, s in report["scorers"].items()}
    rows = [Interval(name, 100 * r["share"], 100 * r["low"], 100 * r["high"]) for name, r in rates.items()]
    svg = intervals(rows, "Win rate", f"% of prompts on which {NAMES[1]} beats {NAMES[0]}", 50, axis([0, 100], 4))
    return Figure("Win rate", "An interval wholly right of 50 % is a win beyond chance. Ties count half.", svg)


def histograms(evaluation: Record) -> list[Figure]:
    """Scores of the responses of both policies: the reward, every scorer, the KL of each response."""
    rows = evaluation.generations
    if not rows:
        return []
    drawn = []
    for name in ("reward", *rows[0]["reference"]["scores"]):
        before, after = (
            [row[role]["reward"] if name == "reward" else row[role]["scores"][name] for row in rows]
            for role in ("reference", "policy")
        )
        title = "Reward" if name == "reward" else name
        svg = histogram(before, after, NAMES, title, f"{name} of a response")
        drawn.append(Figure(title, "The whole of it should move, not one spike; dashed lines are the means.", svg))
    return drawn


def chosen_generations(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Groups of generations: the first ones, unselected; then those whose reward gained and lost most."""
    if not rows:
        return []
    by_gain = sorted(rows, key=lambda row: row["policy"]["reward"] - row["reference"]["reward"])
    groups = [(f"The first {min(GENERATIONS_SHOWN, len(rows))} prompts, not selected", rows[:GENERATIONS_SHOWN])]
    if len(rows) > GENERATIONS_SHOWN:
        groups.append(("Largest gains in reward", by_gain[: -EXTREMES_SHOWN - 1 : -1]))
        groups.append(("Largest losses in reward", by_gain[:EXTREMES_SHOWN]))
    return groups


def stage_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Time, memory and size of every stage, with bars in percent of the largest."""
    seconds = [record.metadata.get("seconds") for record in records]
    host = [record.metadata.get("peakHostBytes") for record in records]
    gpu = [record.metadata.get("peakGpuBytes") for record in records]
    return [
        {
            "stage": record.stage,
            "seconds": seconds[index],
            "seconds_bar": _bar(seconds, index),
            "host": host[index],
            "host_bar": _bar(host, index),
            "gpu": gpu[index],
            "gpu_bar": _bar(gpu, index),
            "size": record.size,
            "device": record.metadata.get("device", ""),
        }
        for index, record in enumerate(records)
    ]


def memory_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each stage on the GPU: its measured peak and the phases that were estimated for it, in bytes. Empty on a CPU."""
    shape = shape_in(records)
    measured = {record.stage: record.metadata.get("peakGpuBytes") for record in records}
    if shape is None or not any(measured.values()):
        return []
    estimated: dict[str, list[Phase]] = {}
    for phase in budget(shape, RunSpec.model_validate(spec_of(records))).phases:
        estimated.setdefault(phase.stage, []).append(phase)
    return [
        {
            "stage": stage,
            "measured": peak,
            "estimated": max(phase.total for phase in estimated[stage]),
            "phases": [(phase.name, phase.total) for phase in estimated[stage]],
        }
        for stage, peak in measured.items()
        if peak and stage in estimated
    ]


def time_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Estimated and measured seconds: of each phase of an update of PPO (the median), else of a stage in all.

    Only of stages on a card whose speed is known here.
    """
    shape = shape_in(records)
    rows = []
    for record in records:
        card = card_named(record.metadata.get("device", "")) if record.metadata.get("peakGpuBytes") else None
        if shape is None or card is None:
            continue
        spec = RunSpec.model_validate(spec_of(records))
        for phase in estimate(shape, spec, card):
            what, estimated, measured = phase.stage, phase.seconds, record.metadata.get("seconds")
            if phase.stage == "ppo":
                what = f"ppo {phase.name}, an update"
                estimated /= spec.ppo.rollouts
                laps = [lap for row in record.curve if (lap := row.get(f"{phase.name}_seconds")) is not None]
                measured = statistics.median(laps) if laps else None
            if phase.stage == record.stage and measured is not None:
                rows.append({"what": what, "card": card.name, "estimated": estimated, "measured": measured})
    return rows


def shape_in(records: Sequence[Record]) -> ModelShape | None:
    """The imported model's shape."""
    imported = next((record for record in records if record.stage == "import-model"), None)
    return ModelShape.from_figures(imported.metadata.get("metrics", {})) if imported else None


def gpu_memory(records: Sequence[Record]) -> str | None:
    """The memory of the GPU that the run asked for; None on a CPU."""
    gpu = spec_of(records).get("gpu", {})
    return str(gpu["memory"]) if gpu.get("count", 0) > 0 else None


def spec_of(records: Sequence[Record]) -> dict[str, Any]:
    """The run's spec, put together from the parts that each stage read."""
    merged: dict[str, Any] = {}
    for record in records:
        merged |= record.settings
        config = record.metadata.get("config", {})
        merged |= {name: config[name] for name in ("gpu", "tracking") if config.get(name)}
    if sft := next((record.settings.get("lora") for record in records if record.stage == "sft"), None):
        # Only sft reads dropout and useDora; it is given `all` for the layers, the later stages the run's own.
        merged["lora"] = {**sft, "layers": merged["lora"]["layers"]}
    data = {"sftData": "sft", "preferenceData": "preferences", "promptData": "prompts", "evaluationData": "evaluation"}
    spec = {name: value for name, value in merged.items() if name not in {*data, "promptTokens", "fingerprint"}}
    if tables := {short: merged[name] for name, short in data.items() if name in merged}:
        spec["data"] = tables
    return spec


def settings_text(records: Sequence[Record]) -> str:
    """The spec as YAML."""
    spec = spec_of(records)
    order = ["model", "data", "quantization", "lora", "sft", "merge", "reward", "ppo", "evaluate"]
    order += ["gpu", "tracking", "seed"]
    text: str = yaml.safe_dump(
        {name: spec[name] for name in order if name in spec}, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def versions(records: Sequence[Record]) -> dict[str, str]:
    """Package -> version; several where stages differ."""
    found: dict[str, list[str]] = {}
    for record in records:
        for package, version in record.metadata.get("versions", {}).items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: ", ".join(each) for package, each in found.items()}


def short(value: float) -> str:
    """A figure of the text: at most three decimals, unless it is smaller than that."""
    return number(round(value, 3) if abs(value) >= 0.001 else value)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def percent(share: float) -> str:
    """A share as percent, one decimal."""
    return f"{100 * share:.1f} %"


def _bar(values: Sequence[float | None], index: int) -> float:
    largest = max((value for value in values if value is not None), default=0)
    return 100 * (values[index] or 0) / largest if largest else 0
