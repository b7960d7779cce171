"""A store outside the cluster that refuses, fills up, slows down: the run says so, waits, and comes to the same bytes.

The store is a MinIO on a small disk of this machine, behind a link of ours at the address by which the nodes know
this machine. It is the release's own, so that the operator asks it too.
"""

import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from bare_plane import install_crd
from faulty_link import FaultyLink
from kubectl import SOON
from minio import Minio
from minio_server import PASSWORD, USER, MinioServer, SmallDisk
from release import BUCKET, STORE_SECRET, Kubectl, Release, given_reward, reviews, tiny_spec

from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY

pytestmark = pytest.mark.timeout(1800)

CHAIN_SECONDS = 1200.0
BURST_SECONDS = 40.0
DISK = 256 << 20
RATE = 64 << 10  # bytes a second of the slow link
CRAWL = 8 << 10  # of one on which an upload can be caught half way
MERGED_WEIGHTS = r"PUT \S*/artifacts/merged-model/\S*\.safetensors"
POLICY_COMMIT = r"PUT \S*/artifacts/policy/[0-9a-f]{64}/manifest\.json"
REFUSALS = 10  # one attempt at a commit gives up after eight


@dataclass
class Outside(Release):
    """A release whose store is outside the cluster."""

    minio: MinioServer
    disk: SmallDisk
    link: FaultyLink

    @contextmanager
    def store_environment(self) -> Iterator[str]:
        """The store's endpoint, past the link, with its credentials in the environment while the block runs."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(ENV_ACCESS_KEY, USER)
            patch.setenv(ENV_SECRET_KEY, PASSWORD)
            yield self.minio.url

    @contextmanager
    def store(self) -> Iterator[Minio]:
        """The store, past the link."""
        yield self.minio.client()

    def use_secret_key(self, key: str) -> None:
        """Change the Secret, and let the operator read it."""
        patch = json.dumps({"stringData": {"AWS_SECRET_ACCESS_KEY": key}})
        self.kubectl("patch", "secret", STORE_SECRET, "--type=merge", "-p", patch)
        self.kubectl("rollout", "restart", f"deployment/{self.operator}")
        self.operator_pod()

    def until_store_fails(self, name: str, words: str) -> None:
        """Wait until the run says that its store is not ready, and why; it made no pod until then."""

        def said() -> bool:
            found = self.condition(name, "StoreReady")
            return found.get("status") == "False" and words in found["message"]

        self.until(said, SOON, lambda: self.words(name))
        assert self.jobs(name) == {}
        assert self.status(name)["phase"] == "Pending"
        assert self.condition(name, "Progressing")["reason"] == "StoreUnavailable"


@pytest.fixture(scope="module")
def outside(
    cluster: Path, cluster_kubectl: Kubectl, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outside]:
    """The chart in a fresh namespace, with a store outside it that holds the tiny sources."""
    from tiny import build_tiny_model  # it takes torch along, which no other test here needs

    folder = tmp_path_factory.mktemp("outside")
    install_crd(cluster)
    namespace = f"rlhf-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        disk = stack.enter_context(SmallDisk(folder / "disk", DISK))
        minio = stack.enter_context(MinioServer(folder, disk.path / "data"))
        address = address_for(cluster_kubectl)
        link = stack.enter_context(FaultyLink(minio.url, host=address))
        build_tiny_model(folder / "sources" / "model", layers=2)
        (folder / "sources" / "reviews.csv").write_text(reviews())
        minio.client().make_bucket(BUCKET)
        for path in (path for path in (folder / "sources").rglob("*") if path.is_file()):
            minio.client().fput_object(BUCKET, path.relative_to(folder).as_posix(), str(path))
        cluster_kubectl("create", "namespace", namespace)
        stack.callback(cluster_kubectl, "delete", "namespace", namespace, "--wait=false")
        cluster_kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        release = Outside(namespace, cluster, cluster_kubectl, images, minio, disk, link)
        stack.callback(release.helm, "uninstall", "rlhf", "--wait", check=False)
        stack.callback(release.kubectl, "delete", "rlhfruns", "--all", "--wait=false", check=False)
        release.install(
            "minio.enabled=false", f"objectStore.endpoint={link.url}", f"networkPolicy.storeCIDRs={{{address}/32}}",
            f"objectStore.accessKey={USER}", f"objectStore.secretKey={PASSWORD}",
        )  # fmt: skip
        yield release


@pytest.fixture(scope="module")
def expected(outside: Outside) -> dict[str, str]:
    """Kind -> content digest of a run that nothing disturbed."""
    outside.apply("calm", given_reward(tiny_spec()))
    outside.wait("calm", timeout=CHAIN_SECONDS)
    return outside.contents("calm")


@pytest.fixture(autouse=True)
def mended(outside: Outside) -> Iterator[None]:
    """The link as it should be, whatever the test did to it."""
    yield
    outside.link.mend()


def again(outside: Outside, name: str, *stages: str) -> None:
    """Apply the run of `expected` under a name of its own, with these stages and the evaluation to make again."""
    outside.forget("calm", *stages, "evaluate")
    outside.apply(name, given_reward(tiny_spec()))


def test_wrong_credentials_are_said_and_put_right(outside: Outside, expected: dict[str, str]) -> None:
    outside.use_secret_key("wrong-wrong-wrong")
    try:
        outside.apply("denied", given_reward(tiny_spec(evaluate={"samples": 4})))
        outside.until_store_fails("denied", "refused the credentials")
    finally:
        outside.use_secret_key(PASSWORD)
    outside.wait("denied", timeout=CHAIN_SECONDS)
    assert outside.condition("denied", "StoreReady")["status"] == "True"
    assert outside.jobs("denied") == {"evaluate": [1]}


def test_a_busy_store_starts_nothing_in_vain(outside: Outside, expected: dict[str, str]) -> None:
    outside.link.refuse()
    until = time.monotonic() + BURST_SECONDS
    again(outside, "burst")
    outside.until_store_fails("burst", "503")
    time.sleep(max(0.0, until - time.monotonic()))
    assert outside.jobs("burst") == {}
    outside.link.mend()
    outside.wait("burst", timeout=CHAIN_SECONDS)
    assert outside.condition("burst", "StoreReady")["status"] == "True"
    assert outside.jobs("burst") == {"evaluate": [1]}
    assert outside.contents("burst") == expected


def test_an_upload_in_the_middle_of_which_the_store_stops_is_made_again(
    outside: Outside, expected: dict[str, str]
) -> None:
    outside.link.seen.clear()
    again(outside, "stopped", "merge")
    outside.running_pod("stopped", "merge", CHAIN_SECONDS)
    outside.link.slow(CRAWL)
    upload = outside.until(
        lambda: outside.link.under_way(MERGED_WEIGHTS), SOON, lambda: outside.words("stopped"), every=0.1
    )
    outside.minio.stop()
    try:
        outside.until(lambda: f"{upload} 0" in outside.link.seen, SOON, lambda: "\n".join(outside.link.seen))
        assert f"{upload} 200" not in outside.link.seen
    finally:
        outside.minio.start()
    outside.link.mend()
    outside.wait("stopped", timeout=CHAIN_SECONDS)
    assert f"{upload} 200" in outside.link.seen
    assert outside.jobs("stopped") == {"merge": [1], "evaluate": [1]}
    assert outside.contents("stopped") == expected


def test_a_slow_link_changes_nothing(outside: Outside, expected: dict[str, str]) -> None:
    outside.link.slow(RATE)
    again(outside, "slow", "merge")
    outside.wait("slow", timeout=CHAIN_SECONDS)
    assert outside.jobs("slow") == {"merge": [1], "evaluate": [1]}
    assert outside.contents("slow") == expected


def test_a_full_disk_holds_a_run_up_until_there_is_room(outside: Outside, expected: dict[str, str]) -> None:
    again(outside, "full", "ppo")
    outside.running_pod("full", "ppo", CHAIN_SECONDS)
    outside.disk.fill()
    try:

        def said() -> bool:
            status = outside.status("full")
            assert status["phase"] not in ("Succeeded", "Failed"), outside.words("full")
            return "disk is full" in json.dumps(status)

        outside.until(said, CHAIN_SECONDS, lambda: outside.words("full"))
    finally:
        outside.disk.empty()
    outside.wait("full", timeout=CHAIN_SECONDS)
    jobs = outside.jobs("full")
    assert set(jobs) == {"ppo", "evaluate"}
    assert len(jobs["ppo"]) >= 2
    assert outside.contents("full") == expected


def test_a_commit_that_a_busy_store_refuses_is_made_again(outside: Outside, expected: dict[str, str]) -> None:
    outside.link.seen.clear()
    outside.link.refuse(POLICY_COMMIT, times=REFUSALS)
    again(outside, "refused", "ppo")
    outside.wait("refused", timeout=CHAIN_SECONDS)
    assert len([line for line in outside.link.seen if line.endswith(" 503")]) == REFUSALS
    assert outside.jobs("refused") == {"ppo": [1, 2], "evaluate": [1]}
    assert outside.contents("refused") == expected


def address_for(kubectl: Kubectl) -> str:
    """The address of this machine that the cluster's nodes, and their pods, can reach. Skips where there is none."""
    path = "jsonpath={.items[0].status.addresses[?(@.type=='InternalIP')].address}"
    node = kubectl("get", "nodes", "-o", path).stdout
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect((node, 9))  # sends nothing: it asks for the way
        except OSError as error:
            pytest.skip(f"no way from this machine to node {node}: {error}")
        address: str = route.getsockname()[0]
        return address
