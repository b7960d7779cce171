"""What the operator is told by its environment, as the chart sets it: image, store, namespace, the pods' defaults."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rlhf_api.errors import UserError
from rlhf_api.names import OPERATOR_METRICS_PORT, OPERATOR_NAME
from rlhf_api.quantity import bytes_of
from rlhf_api.run import ObjectStore, StoreStatus
from rlhf_api.stage import StoreConfig

PREFIX: Final = "RLHF_OPERATOR_"


@dataclass(frozen=True)
class OperatorSettings:
    """Every setting, with the environment variable that holds it (after RLHF_OPERATOR_).

    Lists and mappings are JSON. Quantities are Kubernetes'.
    """

    image: str  # IMAGE: of the stages
    image_pull_policy: str = "IfNotPresent"  # IMAGE_PULL_POLICY
    image_pull_secrets: tuple[str, ...] = ()  # IMAGE_PULL_SECRETS: names, in the run's namespace
    bucket: str = "rlhf"  # STORE_BUCKET
    prefix: str = ""  # STORE_PREFIX
    endpoint: str | None = None  # STORE_ENDPOINT
    region: str | None = None  # STORE_REGION
    credentials_secret: str = "rlhf-object-store"  # STORE_SECRET: in the run's namespace
    namespace: str = "default"  # NAMESPACE: the operator's own, where its Lease is
    watch_namespaces: tuple[str, ...] = ()  # WATCH_NAMESPACE: of the runs, with commas; all where it is not set
    identity: str = OPERATOR_NAME  # IDENTITY: the pod's name
    resources: Mapping[str, Any] = field(default_factory=dict)  # STAGE_RESOURCES: requests and limits of a stage
    gpu_resources: Mapping[str, Any] = field(default_factory=dict)  # GPU_STAGE_RESOURCES: more, of those with a GPU
    ephemeral_storage: str = "20Gi"  # EPHEMERAL_STORAGE: requested by each stage
    shared_memory: str = "1Gi"  # SHARED_MEMORY: most of /dev/shm; counts towards the pod's memory
    grace_seconds: int = 120  # GRACE_SECONDS: for a checkpoint, after SIGTERM
    priority_class: str | None = None  # PRIORITY_CLASS
    workers: int = 8  # WORKERS: runs looked at at once
    metrics_port: int = OPERATOR_METRICS_PORT  # METRICS_PORT

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "OperatorSettings":
        """The settings. Raises UserError, naming the variable, its value and what would be right."""
        read = _Reader(environment)
        return cls(
            image=read.text("IMAGE") or _missing("IMAGE", "the image that runs the stages"),
            image_pull_policy=read.choice("IMAGE_PULL_POLICY", ("IfNotPresent", "Always", "Never")),
            image_pull_secrets=tuple(read.json("IMAGE_PULL_SECRETS", list) or ()),
            bucket=read.text("STORE_BUCKET") or cls.bucket,
            prefix=(read.text("STORE_PREFIX") or "").strip("/"),
            endpoint=read.text("STORE_ENDPOINT"),
            region=read.text("STORE_REGION"),
            credentials_secret=read.text("STORE_SECRET") or cls.credentials_secret,
            namespace=read.text("NAMESPACE") or cls.namespace,
            watch_namespaces=tuple(filter(None, (read.text("WATCH_NAMESPACE") or "").split(","))),
            identity=read.text("IDENTITY") or cls.identity,
            resources=read.json("STAGE_RESOURCES", dict) or {},
            gpu_resources=read.json("GPU_STAGE_RESOURCES", dict) or {},
            ephemeral_storage=read.quantity("EPHEMERAL_STORAGE", cls.ephemeral_storage),
            shared_memory=read.quantity("SHARED_MEMORY", cls.shared_memory),
            grace_seconds=read.number("GRACE_SECONDS", cls.grace_seconds),
            priority_class=read.text("PRIORITY_CLASS"),
            workers=read.number("WORKERS", cls.workers),
            metrics_port=read.number("METRICS_PORT", cls.metrics_port),
        )

    def store_of(self, asked: ObjectStore) -> StoreConfig:
        """The store of a run: what its spec says, and the operator's own where it says nothing."""
        bucket = asked.bucket or self.bucket
        prefix = self.prefix if asked.prefix is None and bucket == self.bucket else (asked.prefix or "").strip("/")
        if bucket == self.bucket and bucket.startswith("file:///"):  # a volume that operator and stages share
            return StoreConfig(url=f"{bucket}/{prefix}" if prefix else bucket)
        url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        return StoreConfig(url=url, endpoint=asked.endpoint or self.endpoint, region=self.region)

    def secret_of(self, asked: ObjectStore) -> str:
        """The Secret with the credentials of a run's store, in the run's namespace."""
        return asked.credentials_secret or self.credentials_secret

    def place_of(self, asked: ObjectStore) -> StoreStatus:
        """What a run's status says of its store."""
        store = self.store_of(asked)
        secret = self.secret_of(asked) if store.url.startswith("s3://") else None
        return StoreStatus(url=store.url, endpoint=store.endpoint, region=store.region, credentials_secret=secret)

    def can_ask(self, asked: ObjectStore) -> bool:
        """Whether a run's store is the operator's own, or a folder of it.

        Elsewhere the operator's credentials may open what the run's do not: who may write runs would read, and with
        onDelete: Delete remove, what is another's.
        """
        own, its = self.store_of(ObjectStore()), self.store_of(asked)
        within = f"{its.url}/".startswith(f"{own.url}/")
        return within and its.endpoint == own.endpoint and self.secret_of(asked) == self.credentials_secret


class _Reader:
    """Reads variables of one environment; an empty one counts as not set."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, name: str) -> str | None:
        return self._environment.get(PREFIX + name) or None

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name) or allowed[0]
        if value not in allowed:
            raise UserError(f"{PREFIX}{name}: {value!r} is none of {', '.join(allowed)}")
        return value

    def number(self, name: str, default: int) -> int:
        value = self.text(name)
        if value is None:
            return default
        if not value.isdecimal() or int(value) == 0:
            raise UserError(f"{PREFIX}{name}: {value!r} is no whole number above 0")
        return int(value)

    def quantity(self, name: str, default: str) -> str:
        value = self.text(name) or default
        try:
            bytes_of(value)
        except ValueError as error:
            raise UserError(f"{PREFIX}{name}: {error}") from None
        return value

    def json[T](self, name: str, kind: type[T]) -> T | None:
        text = self.text(name)
        if text is None:
            return None
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"{PREFIX}{name}: {text!r} is no JSON ({error})") from None
        if not isinstance(value, kind):
            raise UserError(f"{PREFIX}{name}: {text!r} should be a JSON {'list' if kind is list else 'object'}")
        return value


def _missing(name: str, what: str) -> str:
    raise UserError(f"{PREFIX}{name}: is not set; set it to {what}")
