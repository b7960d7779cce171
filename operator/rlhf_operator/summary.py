"""What came of a finished run: the time each stage took, what RLHF changed and what it cost, and the report page."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf_api.errors import UserError
from rlhf_api.run import RunStatus
from rlhf_api.stage import ArtifactRef
from rlhf_operator.figures import duration, key_metrics, number
from rlhf_store.artifacts import Artifacts, Manifest

REPORT_PAGE = "logs/report.html"
REPORT_FIGURES = "report.json"


@dataclass(frozen=True)
class StageSummary:
    """A stage's name, state and figures, and the seconds its artifact took, in this run or an earlier one."""

    name: str
    state: str
    seconds: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """Every stage, and the figures of the evaluation (its report.json)."""

    stages: list[StageSummary]
    evaluation: dict[str, Any]


def artifact_of(status: RunStatus, stage: str) -> ArtifactRef | None:
    """The address of a stage's output, committed or not; None where the stage does not run."""
    found = next((each.artifact for each in status.stages if each.name == stage), None)
    return ArtifactRef.parse(found) if found else None


def summarize(status: RunStatus, artifacts: Artifacts) -> Summary:
    """The summary of a run whose status is given. Artifacts that are gone have no figures."""
    stages = []
    evaluation: dict[str, Any] = {}
    for stage in status.stages:
        ref = artifact_of(status, stage.name)
        manifest = artifacts.find(ref) if ref else None
        seconds = manifest.metadata.get("seconds") if manifest else None
        stages.append(StageSummary(stage.name, stage.state, seconds, dict(stage.metrics)))
        if manifest and manifest.kind == "evaluation":
            evaluation = _figures(artifacts, manifest)
    return Summary(stages, evaluation)


def summary_table(summary: Summary) -> Group:
    """The summary as it is printed."""
    stages = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    stages.add_column("figures", overflow="fold")
    for stage in summary.stages:
        if stage.state != "Skipped":
            time = duration(stage.seconds) if stage.seconds is not None else ""
            again = "reused  " if stage.state == "Reused" else ""
            stages.add_row(stage.name, time, Text(again + key_metrics(stage.metrics, 4), style="dim"))
    parts: list[Any] = [Text(), stages]
    if "reward" in summary.evaluation:
        parts += [Text(), _evaluation_table(summary.evaluation)]
        if cost := summary.evaluation.get("kl"):
            parts.append(Text(f"KL paid for it: {_interval(cost)} nats a response"))
    return Group(*parts, Text())


def save_report(status: RunStatus, artifacts: Artifacts, path: Path) -> Path | None:
    """Copy the report page of the evaluation to `path`; None if the evaluation has none."""
    ref = artifact_of(status, "evaluate")
    manifest = artifacts.find(ref) if ref else None
    if manifest is None or REPORT_PAGE not in manifest.files:
        return None
    page = artifacts.read_range(manifest, REPORT_PAGE, 0, manifest.files[REPORT_PAGE].size)
    try:
        path.write_bytes(page)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; name a file that can be written") from error
    return path


def _figures(artifacts: Artifacts, manifest: Manifest) -> dict[str, Any]:
    if REPORT_FIGURES not in manifest.files:
        return {}
    text = artifacts.read_range(manifest, REPORT_FIGURES, 0, manifest.files[REPORT_FIGURES].size)
    figures: dict[str, Any] = json.loads(text)
    return figures


def _evaluation_table(evaluation: dict[str, Any]) -> Table:
    """One row a scorer: the mean before and after PPO, the paired rise with its interval, and the win rate."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(f"{evaluation.get('samples', '')} held-out prompts".strip())
    for heading in ("before", "after", "rise (95 %)", "wins"):
        table.add_column(heading, justify="right")
    for name, compared in {"reward": evaluation["reward"], **evaluation.get("scorers", {})}.items():
        rise = compared["rise"]
        clear = rise["low"] > 0 or rise["high"] < 0
        table.add_row(
            name,
            number(compared["reference"]["mean"]),
            number(compared["policy"]["mean"]),
            Text(_interval(rise, sign=True), style="bold" if clear else ""),
            f"{compared['win_rate']['share']:.0%}" if "win_rate" in compared else "",
        )
    return table


def _interval(mean: dict[str, float], sign: bool = False) -> str:
    plus = "+" if sign and mean["mean"] > 0 else ""
    return f"{plus}{number(mean['mean'])} [{number(mean['low'])}, {number(mean['high'])}]"
