"""How far a stage's pod is, read from the metrics that it serves."""

from typing import Final

import urllib3
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from rlhf_api.names import (
    METRIC_ETA,
    METRIC_FIGURE,
    METRIC_PHASE,
    METRIC_STARTED,
    METRIC_STEP,
    METRIC_STEPS,
    METRIC_UPDATED,
    METRICS_PORT,
)
from rlhf_api.stage import Progress

TIMEOUT: Final = urllib3.Timeout(connect=0.5, read=2)
MOST_BYTES: Final = 1 << 20  # a stage serves a few kilobytes


def progress_from(pool: urllib3.PoolManager, address: str, stage: str) -> Progress | None:
    """What the pod at an IP address says of its stage; None if it does not answer, or with something else."""
    host = f"[{address}]" if ":" in address else address
    try:
        response = pool.request(
            "GET", f"http://{host}:{METRICS_PORT}/metrics", timeout=TIMEOUT, retries=False, preload_content=False
        )
        with response:
            page = response.read(MOST_BYTES)
    except urllib3.exceptions.HTTPError:
        return None
    return parsed(page.decode(errors="replace"), stage) if response.status == 200 else None


def parsed(page: str, stage: str) -> Progress | None:
    """The Progress that a page of metrics holds; None if it is not one of a stage."""
    numbers: dict[str, float] = {}
    figures: dict[str, float] = {}
    phase = ""
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == METRIC_FIGURE:
                    figures[sample.labels["name"]] = sample.value
                elif sample.name == METRIC_PHASE:
                    phase = sample.labels.get("phase", "")
                else:
                    numbers[sample.name] = sample.value
        return Progress(
            stage=stage,
            step=int(numbers[METRIC_STEP]),
            total=int(numbers[METRIC_STEPS]),
            phase=phase,
            metrics=figures,
            started_at=numbers.get(METRIC_STARTED, 0.0),
            updated_at=numbers.get(METRIC_UPDATED, 0.0),
            eta_seconds=numbers.get(METRIC_ETA),
        )
    except (ValueError, KeyError, OverflowError, ValidationError):  # not ours to judge: there is no progress to show
        return None
