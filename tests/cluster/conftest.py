"""A real Kubernetes for the tests of this folder: the one of `--kubeconfig`, or ours from hack/cluster."""

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_plane import BarePlane, bare_plane, install_crd
from calm import CALM, undisturbed
from kubectl import BIN, Kubectl, kubectl_of
from release import BUCKET, Release, reviews
from xdist.scheduler.loadscope import LoadScopeScheduling

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "hack" / "cluster"

# A lane runs one of these files, or all the others: so there is one control plane without nodes, however many lanes.
# The longest come first, so that at the end no lane is busy alone.
ON_NODES = (
    "test_disturbances", "test_lost_pods", "test_bad_store", "test_run", "test_smollm2", "test_kueue",
    "test_commands_in_pods", "test_network_policies", "test_nodes",
)  # fmt: skip
SECOND = 2  # of the lanes by length: all the others


class Lanes(LoadScopeScheduling):
    """Hands out lanes whole."""

    def _split_scope(self, nodeid: str) -> str:
        stem = Path(nodeid.split("::")[0]).stem
        return stem if stem in ON_NODES else "without nodes"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    """The scheduler of `pytest -n`."""
    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest lane first; the order within stays."""
    order = [*ON_NODES[:SECOND], "", *ON_NODES[SECOND:]]
    items.sort(key=lambda item: order.index(item.path.stem if item.path.stem in ON_NODES else ""))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kubeconfig",
        type=Path,
        help="run tests/cluster on this cluster; without it the cluster of hack/cluster is started and kept",
    )
    parser.addoption(
        "--every-write", action="store_true", help="kill the operator around every write of a run, not around some"
    )
    parser.addoption(
        "--load",
        nargs=2,
        type=int,
        default=(50, 10),
        metavar=("RUNS", "MORE"),
        help="runs at once, and further ones in the middle of which the operator is killed",
    )
    parser.addoption(
        "--image",
        action="append",
        default=[],
        metavar="NAME=REPOSITORY:TAG",
        help="an image that the nodes can pull: operator=..., pipeline=... (CPU), minio=...; without it all three are "
        "built and put on the nodes of a kind cluster",
    )


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Path:
    """Kubeconfig of a cluster with nodes that run pods, one of them labelled as a node with a 24 GB GPU.

    Ours is started where it does not run, and kept after the tests: `make cluster-down` removes it.
    """
    given: Path | None = request.config.getoption("--kubeconfig")
    if given:
        return given.resolve()
    started = subprocess.run([SCRIPTS / "up.sh"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(started.stdout.strip())


@pytest.fixture(scope="session")
def own_plane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BarePlane]:
    """A control plane without nodes whose files can be read; it ends with the tests."""
    if request.config.getoption("--kubeconfig") and not (BIN / "kube-apiserver").exists():
        pytest.skip("needs a control plane of its own, from `hack/cluster/tools.sh control-plane`")
    with bare_plane(tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture(scope="session")
def api_server(request: pytest.FixtureRequest) -> Path:
    """Kubeconfig of an API server that knows RLHFRun: the one given, or that of `own_plane`."""
    given: Path | None = request.config.getoption("--kubeconfig")
    if given:
        install_crd(given.resolve())
        return given.resolve()
    plane: BarePlane = request.getfixturevalue("own_plane")
    return plane.kubeconfig


@pytest.fixture(scope="session")
def own_kubectl(own_plane: BarePlane) -> Kubectl:
    """kubectl on `own_plane`."""
    return kubectl_of(own_plane.kubeconfig)


@pytest.fixture(scope="session")
def api_kubectl(api_server: Path) -> Kubectl:
    """kubectl on `api_server`."""
    return kubectl_of(api_server)


@pytest.fixture(scope="session")
def cluster_kubectl(cluster: Path) -> Kubectl:
    """kubectl on `cluster`."""
    return kubectl_of(cluster)


@pytest.fixture
def api_namespace(api_kubectl: Kubectl) -> Iterator[str]:
    """A fresh namespace of `api_server`."""
    yield from _namespace(api_kubectl)


@pytest.fixture
def cluster_namespace(cluster_kubectl: Kubectl) -> Iterator[str]:
    """A fresh namespace of `cluster`."""
    yield from _namespace(cluster_kubectl)


@pytest.fixture(scope="session")
def images(cluster: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """operator, pipeline, minio -> an image that the nodes of `cluster` have or can pull."""
    lines: list[str] = request.config.getoption("--image")
    if not lines:
        environment = {**os.environ, "KUBECONFIG": str(cluster)}
        built = subprocess.run([SCRIPTS / "images.sh"], check=True, stdout=subprocess.PIPE, text=True, env=environment)
        lines = built.stdout.split()
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="session")
def release(
    cluster: Path, cluster_kubectl: Kubectl, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Release]:
    """The chart in a fresh namespace under the restricted Pod Security level, its store filled with tiny sources."""
    from tiny import build_tiny_model  # it takes torch along, which no other test here needs

    install_crd(cluster)
    namespace = f"rlhf-{uuid.uuid4().hex[:8]}"
    cluster_kubectl("create", "namespace", namespace)
    cluster_kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    release = Release(namespace, cluster, cluster_kubectl, images)
    try:
        release.install()
        folder = tmp_path_factory.mktemp("sources")
        build_tiny_model(folder / "model", layers=2)
        (folder / "reviews.csv").write_text(reviews())
        with release.store() as store:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    store.fput_object(BUCKET, f"sources/{path.relative_to(folder)}", str(path))
        yield release
    finally:
        release.kubectl("delete", "rlhfruns", "--all", "--wait=false", check=False)
        release.helm("uninstall", "rlhf", "--wait", check=False)
        cluster_kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture(scope="session")
def calm(release: Release) -> dict[str, Any]:
    """The final status of `calm.CALM`, a run that nothing disturbed. Its Jobs and pods stay."""
    return undisturbed(release)


@pytest.fixture(scope="session")
def expected(release: Release, calm: dict[str, Any]) -> dict[str, str]:
    """Stage -> content digest of that run: what the disturbed ones must come to."""
    return release.contents(CALM)


@pytest.fixture(scope="session")
def load_image(cluster: Path) -> Callable[[Path], None]:
    """A function that puts the images of a docker-archive file on every node of `cluster`, which kind made."""

    def load(archive: Path) -> None:
        environment = {**os.environ, "KUBECONFIG": str(cluster)}
        loaded = subprocess.run([SCRIPTS / "load-image.sh", archive], env=environment, text=True, capture_output=True)
        assert loaded.returncode == 0, loaded.stderr

    return load


def _namespace(kubectl: Kubectl) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
