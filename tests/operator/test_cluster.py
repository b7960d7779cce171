"""The calls to the Kubernetes API that the operator makes, as they are asked."""

from typing import Any

from rlhf_operator.cluster import KubernetesCluster
from rlhf_operator.seen import Seen

Document = dict[str, Any]


class Asked:
    """Notes each request and answers it with its body."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str] | None]] = []

    def request(self, method: str, path: str, body: Document, query: dict[str, str] | None = None) -> Document:
        self.requests.append((method, path, query))
        return body


def test_a_job_is_asked_for_with_every_field_or_not_at_all() -> None:
    api = Asked()
    cluster = KubernetesCluster(api, Seen(), (), lambda: None)  # type: ignore[arg-type]
    cluster.create_job({"metadata": {"name": "run-ppo-1", "namespace": "team", "resourceVersion": "1"}})
    assert api.requests == [("POST", "/apis/batch/v1/namespaces/team/jobs", {"fieldValidation": "Strict"})]
