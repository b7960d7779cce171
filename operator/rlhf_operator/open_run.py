"""One run with its artifacts within reach, wherever it ran: what `rlhf report` and `rlhf generate` work on."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf_api.run import RunStatus
from rlhf_api.stage import StoreConfig
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.place import home
from rlhf_store.artifacts import Artifacts, open_artifacts


@dataclass(frozen=True)
class OpenRun:
    """`store` is as this machine reaches it, `environment` has its credentials; `finish` says how the run gets done."""

    name: str
    status: RunStatus
    store: StoreConfig
    environment: Mapping[str, str]
    finish: str

    @property
    def artifacts(self) -> Artifacts:
        """What the store holds. Raises StoreError if there are no credentials."""
        return open_artifacts(self.store, environment=self.environment)


@contextmanager
def opened(name: str, where: ClusterOptions | None, endpoint: str | None = None) -> Iterator[OpenRun]:
    """A run of this folder, or of a cluster. `endpoint`: of its store, in place of the one that the run names.

    Raises UserError if there is no such run.
    """
    if where is not None:
        from rlhf_operator.cluster_store import opened_in_cluster

        with opened_in_cluster(name, where, endpoint) as run:
            yield run
        return
    folder = home().run_folder(name)
    status, store = folder.need_status(), folder.store()
    if endpoint:
        store = store.model_copy(update={"endpoint": endpoint})
    yield OpenRun(name, status, store, os.environ, "finish it with `rlhf run`")
