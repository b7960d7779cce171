"""The operator's own metrics, served on their own port."""

from collections import Counter as Count
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rlhf_api.run import Phase
from rlhf_operator.pod_template import Document

PHASES: tuple[Phase, ...] = ("Pending", "Running", "Suspended", "Succeeded", "Failed")


class OperatorMetrics:
    """One set of metrics, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "rlhf_operator_reconcile_seconds",
            "Time of one look at a run.",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.failures = Counter(
            "rlhf_operator_reconcile_failures",
            "Looks at a run that failed and are tried again.",
            registry=self.registry,
        )
        self.actions = Counter(
            "rlhf_operator_actions", "What was done for runs.", labelnames=["action"], registry=self.registry
        )
        self.queue_depth = Gauge("rlhf_operator_queue_depth", "Runs that wait to be looked at.", registry=self.registry)
        self.runs = Gauge("rlhf_operator_runs", "Runs by phase.", labelnames=["phase"], registry=self.registry)
        self.leads = Gauge("rlhf_operator_leads", "1 while this operator holds the Lease.", registry=self.registry)

    def count_runs(self, runs: Iterable[Document]) -> None:
        """Set the number of runs in each phase; a new run without a status is pending."""
        phases: Mapping[str, int] = Count((run.get("status") or {}).get("phase", "Pending") for run in runs)
        for phase in PHASES:
            self.runs.labels(phase).set(phases.get(phase, 0))
