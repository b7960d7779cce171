"""How far a stage's pod is, read from the metrics that it serves."""

import socket
import time
from typing import Final

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

CONNECT_SECONDS: Final = 0.5
SECONDS: Final = 2.5  # in all: a pod that drips must not hold a worker
MOST_BYTES: Final = 1 << 20  # a stage serves a few kilobytes


def progress_from(address: str, stage: str, port: int = METRICS_PORT) -> Progress | None:
    """What the pod at an IP address says of its stage; None if it does not answer in time, or with something else."""
    try:
        page = _page(address, port)
    except OSError:
        return None
    head, _, body = page.partition(b"\r\n\r\n")
    return parsed(body.decode(errors="replace"), stage) if head.split()[1:2] == [b"200"] else None


def _page(address: str, port: int) -> bytes:
    """The answer with its head. By hand, since clients bound the time of each read and not that of all.

    Raises OSError if it does not end in time or within MOST_BYTES.
    """
    deadline = time.monotonic() + SECONDS
    with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\nHost: stage\r\n\r\n")
        page = bytearray()
        while len(page) <= MOST_BYTES and (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (data := connection.recv(MOST_BYTES)):
                return bytes(page)
            page += data
    raise OSError(f"no end of the metrics of {address} within {SECONDS:g} s and {MOST_BYTES} bytes")


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
