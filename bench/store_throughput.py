"""How fast a large file goes through the store, against plain minio-py on the same MinIO, alternating in one run.

    python bench/store_throughput.py [--mib 1024] [--rounds 3] [--folder /dev/shm]

Ours takes the SHA-256 of every byte both ways; plain minio-py checks nothing. The third column is plain
minio-py with a SHA-256 of the file before the upload or after the download: what the check costs done naively.
"""

import argparse
import hashlib
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minio import Minio

from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts

USER, PASSWORD, BUCKET = "benchmark", "benchmark-secret", "benchmark"


def main() -> None:
    """Print MiB/s of each way and the ratios, as medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where server and files lie; default: the temporary one"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name, _minio(Path(name)) as address:
        seconds = measure(Path(name), address, options.mib, options.rounds)
    for way in ("upload", "download"):
        rates = {who: options.mib / statistics.median(seconds[way, who]) for who in ("ours", "plain", "plain+sha256")}
        print(
            f"{way:8} {options.mib} MiB: "
            + ", ".join(f"{who} {rate:.0f} MiB/s" for who, rate in rates.items())
            + f"; ours is {rates['ours'] / rates['plain']:.2f} x plain, "
            + f"{rates['ours'] / rates['plain+sha256']:.2f} x plain+sha256"
        )


def measure(folder: Path, address: str, mib: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds by (direction, who), one for each round."""
    os.environ[ENV_ACCESS_KEY], os.environ[ENV_SECRET_KEY] = USER, PASSWORD
    client = Minio(address, USER, PASSWORD, secure=False)
    client.make_bucket(BUCKET)
    artifacts = open_artifacts(StoreConfig(url=f"s3://{BUCKET}/ours", endpoint=f"http://{address}"))
    local, got = folder / "weights", folder / "got"
    with local.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    seconds: dict[tuple[str, str], list[float]] = {}

    def timed(way: str, who: str, transfer: Callable[[], object]) -> None:
        began = time.perf_counter()
        transfer()
        seconds.setdefault((way, who), []).append(time.perf_counter() - began)

    for number in range(rounds):
        ref = ArtifactRef(kind="model", digest=f"{number:064x}")

        def up_ours(ref: ArtifactRef = ref) -> None:
            writer = artifacts.writer(ref, "1")
            writer.add_file("weights", local)
            writer.commit({})

        timed("upload", "ours", up_ours)
        timed("upload", "plain", lambda: client.fput_object(BUCKET, "plain", str(local)))
        timed("upload", "plain+sha256", lambda: (_sha256(local), client.fput_object(BUCKET, "plain", str(local))))
        timed("download", "ours", lambda ref=ref: artifacts.fetch(ref, got))
        (got / "weights").unlink()
        timed("download", "plain", lambda: client.fget_object(BUCKET, "plain", str(got / "plain")))
        (got / "plain").unlink()
        timed(
            "download",
            "plain+sha256",
            lambda: (client.fget_object(BUCKET, "plain", str(got / "plain")), _sha256(got / "plain")),
        )
        (got / "plain").unlink()
        client.remove_object(BUCKET, f"ours/artifacts/{ref}/1/weights")
    return seconds


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _minio(folder: Path) -> Iterator[str]:
    script = Path(__file__).parent.parent / "hack" / "minio.sh"
    binary = subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": PASSWORD, "MINIO_BROWSER": "off"}
    server = subprocess.Popen(
        [binary, "server", "--quiet", "--address", address, str(folder / "data")],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/minio/health/live", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
