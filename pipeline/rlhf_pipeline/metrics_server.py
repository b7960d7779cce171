"""What a running stage serves to Prometheus, and to the operator for status: http://POD:RLHF_METRICS_PORT/metrics."""

import socket
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rlhf_api.errors import StoreError, UserError
from rlhf_api.names import (
    ENV_METRICS_PORT,
    METRIC_ETA,
    METRIC_FIGURE,
    METRIC_GPU_MEMORY,
    METRIC_HOST_MEMORY,
    METRIC_INFO,
    METRIC_LOGGED,
    METRIC_PHASE,
    METRIC_STARTED,
    METRIC_STEP,
    METRIC_STEPS,
    METRIC_UPDATED,
)
from rlhf_pipeline.stage_process import Stage, peak_gpu_bytes, peak_host_bytes


def serve_metrics(stage: Stage, environment: Mapping[str, str]) -> None:
    """Serve the stage's metrics from a thread until the process ends; nothing where RLHF_METRICS_PORT is not set.

    Raises UserError if the variable is no port, StoreError if it cannot be listened on.
    """
    text = environment.get(ENV_METRICS_PORT)
    if not text:
        return
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"{ENV_METRICS_PORT}: {text!r} is no port; set a number from 1 to 65535")
    registry = CollectorRegistry()
    registry.register(StageCollector(stage))
    try:
        start_http_server(int(text), "::" if socket.has_dualstack_ipv6() else "0.0.0.0", registry)
    except OSError as error:
        raise StoreError(f"{ENV_METRICS_PORT}: cannot listen on port {text} ({error}); set a free one") from error


class StageCollector(Collector):
    """Reads a stage's progress and newest figures at the moment they are asked for: between, it costs nothing."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family a metric. Those not known yet, such as the time left, are absent."""
        config, progress = self._stage.config, self._stage.progress.now
        yield _labelled(
            METRIC_INFO,
            "Which stage of which run this is.",
            {
                "run": config.run.name,
                "namespace": config.run.namespace,
                "stage": config.stage,
                "program": config.program,
                "attempt": config.attempt,
                "artifact": str(config.output),
            },
        )
        yield _labelled(METRIC_PHASE, "What the stage is doing, as the label phase.", {"phase": progress.phase})
        yield GaugeMetricFamily(METRIC_STEP, "Steps done.", progress.step)
        yield GaugeMetricFamily(METRIC_STEPS, "Steps in all; 0 while not known.", progress.total)
        yield GaugeMetricFamily(METRIC_STARTED, "When the stage began, Unix time.", progress.started_at)
        yield GaugeMetricFamily(METRIC_UPDATED, "When it last reported progress, Unix time.", progress.updated_at)
        if progress.eta_seconds is not None:
            yield GaugeMetricFamily(METRIC_ETA, "Time left of this phase, in seconds.", progress.eta_seconds)
        yield _figures(METRIC_FIGURE, "Figures that status shows.", progress.metrics)
        yield _figures(METRIC_LOGGED, "Everything logged at the newest step.", self._stage.logged)
        yield GaugeMetricFamily(METRIC_HOST_MEMORY, "Most memory this process has held.", peak_host_bytes())
        if (peak := peak_gpu_bytes()) is not None:
            yield GaugeMetricFamily(METRIC_GPU_MEMORY, "Most memory this process has held on a GPU.", peak)


def _labelled(name: str, about: str, labels: Mapping[str, str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def _figures(name: str, about: str, figures: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=["name"])
    for key, value in figures.items():
        family.add_metric([key], float(value))
    return family
