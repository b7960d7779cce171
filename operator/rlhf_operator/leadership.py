"""Who leads: one Lease, held by one operator at a time, so that two never act at once."""

import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol

import urllib3

from rlhf_api.names import OPERATOR_NAME
from rlhf_operator.kubernetes_api import AlreadyExists, ApiError, Conflict, NotFound
from rlhf_operator.pod_template import Document

LEASE_SECONDS: Final = 15.0  # after which a silent leader may be followed
RENEW_WITHIN: Final = 10.0  # a leader that could not renew for so long stops acting; less than the above
TICK_SECONDS: Final = 3.0
# For an answer: after one that does not come there is time to ask again, by another connection.
TIMEOUT: Final = urllib3.Timeout(total=RENEW_WITHIN / 2)


class Requests(Protocol):
    """What is needed of the API server."""

    def request(
        self, method: str, path: str, body: Document | None = None, *, timeout: urllib3.Timeout = TIMEOUT
    ) -> Document:
        """Send one request. Raises ApiError, of the class that fits the answer."""


class Leadership:
    """This operator's claim to the Lease. `tick` it every TICK_SECONDS; ask `check` before each write.

    Only time that has passed here counts: another's claim is dead when its Lease has not changed for LEASE_SECONDS as
    seen from here. `monotonic` gives seconds.
    """

    def __init__(
        self, api: Requests, namespace: str, identity: str, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.identity = f"{identity}_{uuid.uuid4().hex[:8]}"  # a restarted container is another claimant
        self._api, self._monotonic = api, monotonic
        self._folder = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace = namespace
        self._lock = threading.Lock()
        self.term = 0  # how often it has begun to lead
        self._renewed: float | None = None
        self._seen: tuple[str, float] | None = None  # the last version of another's Lease, and when it was new

    @property
    def leads(self) -> bool:
        """Whether this operator may act now."""
        with self._lock:
            return self._holds()

    def check(self) -> None:
        """Raises ApiError unless this operator leads."""
        if not self.leads:
            raise ApiError(f"{self.identity} does not hold the Lease {OPERATOR_NAME}; it waits until it does")

    def tick(self) -> bool:
        """Renew the Lease, or take it if it is free; returns whether this operator leads. Raises ApiError."""
        try:
            lease = self._request("GET", f"{self._folder}/{OPERATOR_NAME}")
        except NotFound:
            return self._create()
        if not self._may_hold(lease):
            self._lose()
            return False
        began = self._monotonic()
        changed = {**lease, "spec": self._spec(lease)}
        try:
            self._request("PUT", f"{self._folder}/{OPERATOR_NAME}", changed)
        except Conflict:  # somebody was faster
            self._lose()
            return False
        self._win(began)
        return self.leads

    def release(self) -> None:
        """Let the next operator lead at once. Raises ApiError."""
        if not self.leads:
            return
        self._lose()
        lease = self._request("GET", f"{self._folder}/{OPERATOR_NAME}")
        if lease["spec"].get("holderIdentity") == self.identity:
            freed = {**lease, "spec": lease["spec"] | {"holderIdentity": ""}}
            self._request("PUT", f"{self._folder}/{OPERATOR_NAME}", freed)

    def _create(self) -> bool:
        metadata = {"name": OPERATOR_NAME, "namespace": self._namespace}
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": self._spec({}),
        }
        began = self._monotonic()
        try:
            self._request("POST", self._folder, lease)
        except AlreadyExists:
            return False
        self._win(began)
        return self.leads

    def _may_hold(self, lease: Document) -> bool:
        holder = lease["spec"].get("holderIdentity")
        if holder in (None, "", self.identity):
            return True
        version, now = lease["metadata"]["resourceVersion"], self._monotonic()
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] >= LEASE_SECONDS

    def _spec(self, lease: Document) -> Document:
        spec: Document = lease.get("spec", {})
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = spec.get("holderIdentity") == self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(LEASE_SECONDS),
            "acquireTime": spec["acquireTime"] if same else now,
            "renewTime": now,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if same or not spec else 1),
        }

    def _win(self, began: float) -> None:
        with self._lock:
            again = self._holds()
            self._renewed = began  # when it was asked for: the answer may have taken long
            self.term += not again and self._holds()
        self._seen = None

    def _lose(self) -> None:
        with self._lock:
            self._renewed = None

    def _holds(self) -> bool:
        return self._renewed is not None and self._monotonic() - self._renewed < RENEW_WITHIN

    def _request(self, method: str, path: str, body: Document | None = None) -> Document:
        return self._api.request(method, path, body, timeout=TIMEOUT)
