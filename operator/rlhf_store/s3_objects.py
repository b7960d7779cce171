"""Objects in an S3 bucket, of any store that honours If-None-Match: * on PUT (AWS, MinIO, Ceph, SeaweedFS, …)."""

import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, MinioException, S3Error
from urllib3.exceptions import HTTPError, MaxRetryError

from rlhf_api.errors import StoreError, UserError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY, ENV_SESSION_TOKEN
from rlhf_api.stage import StoreConfig
from rlhf_store.objects import FileDigest, ObjectInfo

PART = 16 << 20  # bytes of an upload's part
UPLOADS = 4  # parts at once; memory is about PART * (UPLOADS + 2)
MAX_PARTS = 10_000  # S3's limit
READS = 4  # tries at a range whose connection breaks while it is read
BLOCK = 64 << 10  # bytes handed to the network at once
BACKOFF = 0.3  # seconds before the second repetition of a request; each pause after it is twice the one before

_CREDENTIALS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"}


class S3Objects:
    """An object store at s3://bucket/prefix. Uploads that a killed writer leaves half done are never visible."""

    def __init__(self, client: Any, http: urllib3.PoolManager, bucket: str, prefix: str, endpoint: str) -> None:
        self.url = f"s3://{bucket}/{prefix}"
        self._client, self._http = client, http
        self._bucket, self._prefix, self._endpoint = bucket, prefix, endpoint
        self._decides_races = False

    @classmethod
    def from_environment(
        cls, store: StoreConfig, environment: Mapping[str, str], patience: float = 15.0
    ) -> "S3Objects":
        """The store, with the credentials of the environment. Nothing is sent yet.

        `patience`: seconds that it may be silent, or away, before a request fails.
        """
        access, secret = environment.get(ENV_ACCESS_KEY), environment.get(ENV_SECRET_KEY)
        if not access or not secret:
            raise StoreError(f"{store.url}: no credentials; set {ENV_ACCESS_KEY} and {ENV_SECRET_KEY}")
        url = urlsplit(store.url)
        prefix = url.path.strip("/")
        if url.query or url.fragment:
            raise UserError(f"{store.url}: no prefix of a store has ? or # in it; choose another")
        endpoint = store.endpoint or "https://s3.amazonaws.com"
        server = urlsplit(endpoint)
        if server.scheme not in ("http", "https") or not server.netloc or server.path.strip("/"):
            raise UserError(f"store.endpoint: {endpoint!r} is not http://host:port or https://host:port")
        http = _InBlocks(
            timeout=urllib3.Timeout(connect=min(10, patience), read=patience),
            maxsize=32,
            blocksize=BLOCK,
            cert_reqs="CERT_REQUIRED",
            ca_certs=environment.get("SSL_CERT_FILE") or certifi.where(),
            retries=_retries(patience),
        )
        try:
            client = Minio(
                server.netloc,
                access_key=access,
                secret_key=secret,
                session_token=environment.get(ENV_SESSION_TOKEN) or None,
                secure=server.scheme == "https",
                region=store.region,
                http_client=http,
            )
        except ValueError as error:
            raise UserError(f"store.endpoint: {endpoint!r}: {error}") from error
        return cls(client, http, url.netloc, f"{prefix}/" if prefix else "", endpoint)

    def make_bucket(self) -> bool:
        """Make the bucket where there is none. Returns whether it did; raises StoreError if it may not."""
        with self._errors("make the bucket"):
            if self._client.bucket_exists(self._bucket):
                return False
            try:
                self._client.make_bucket(self._bucket)
            except S3Error as error:
                if error.code == "BucketAlreadyOwnedByYou":  # made by another in between
                    return False
                raise
            return True

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> bool:
        with self._errors(key):
            if not if_none_match:
                self._client.put_object(self._bucket, self._prefix + key, io.BytesIO(data), len(data))
                return True
            self._need_if_none_match()
            return self._put_if_absent(key, data)

    def put_file(self, key: str, path: Path, settled: bool = False) -> FileDigest:  # noqa: ARG002 - it is sent either way
        with self._errors(key):
            try:
                return self._send_file(key, path)
            except S3Error as error:
                # The answer that ended an upload was lost, and it was asked to end again; or somebody swept it away.
                if error.code != "NoSuchUpload":
                    raise
                return self._send_file(key, path)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        with self._errors(key):
            for last in [False] * (READS - 1) + [True]:
                try:
                    return self._read(key, start, length)
                except HTTPError as error:  # a request that got no answer was tried again already
                    if last or isinstance(error, MaxRetryError):
                        raise
                    time.sleep(0.2)
        raise AssertionError("unreachable")

    def head(self, key: str) -> ObjectInfo | None:
        with self._errors(key):
            try:
                found = self._client.stat_object(self._bucket, self._prefix + key)
            except S3Error as error:
                if self._says_absent(error, key):
                    return None
                raise
        return ObjectInfo(key, found.size, found.last_modified.timestamp())

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            for found in self._client.list_objects(self._bucket, self._prefix + prefix, recursive=True):
                key = found.object_name.removeprefix(self._prefix)
                yield ObjectInfo(key, found.size, found.last_modified.timestamp())

    def folders(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            found = self._client.list_objects(self._bucket, self._prefix + prefix, recursive=False)
            return sorted(each.object_name.rstrip("/").rsplit("/", 1)[-1] for each in found if each.is_dir)

    def delete(self, keys: Iterable[str]) -> None:
        objects = [DeleteObject(self._prefix + key) for key in keys]
        with self._errors("delete"):
            for error in self._client.remove_objects(self._bucket, objects):
                if error.code != "NoSuchKey":
                    raise StoreError(f"store {self.url}: cannot delete {error.name}: {error.code}: {error.message}")

    def path(self, key: str) -> Path | None:  # noqa: ARG002 - never on this machine
        return None

    def sweep(self, before: float, dry_run: bool) -> list[str]:  # noqa: ARG002
        """Nothing: half-done uploads expire by the store's rule (MinIO's after a day, others' by lifecycle)."""
        return []

    def _send_file(self, key: str, path: Path) -> FileDigest:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            reader = _HashingReader(file)
            self._client.put_object(
                self._bucket,
                self._prefix + key,
                reader,
                size,
                part_size=max(PART, -(-size // MAX_PARTS)),
                num_parallel_uploads=UPLOADS,
            )
        return FileDigest(size, reader.digest.hexdigest())

    def _read(self, key: str, start: int, length: int | None) -> bytes:
        try:
            response = self._client.get_object(self._bucket, self._prefix + key, start, length or 0)
        except S3Error as error:
            if self._says_absent(error, key):
                raise KeyError(key) from None
            if error.code == "InvalidRange":  # starts at or after the end
                return b""
            raise
        try:
            data: bytes = response.read()
            return data
        finally:
            response.close()
            response.release_conn()

    def _says_absent(self, error: S3Error, key: str) -> bool:
        """Whether there is no such object. AWS denies it to credentials that may list less than the whole bucket."""
        if error.code != "AccessDenied":
            return bool(error.code == "NoSuchKey")
        name = self._prefix + key
        try:
            return all(found.object_name != name for found in self._client.list_objects(self._bucket, name))
        except S3Error:  # it may not list here either
            return False

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        """minio-py has no conditional put: its presigned URL, with the header added."""
        for _ in range(10):
            url = self._client.get_presigned_url("PUT", self._bucket, self._prefix + key)
            response = self._http.request("PUT", url, body=data, headers={"If-None-Match": "*"})
            match response.status:
                case 200:
                    return True
                case 412:
                    return False
                case 409:  # AWS: another conditional write of this key is under way
                    time.sleep(0.1)
                case 400 | 501 if b"NotImplemented" in response.data or response.status == 501:
                    raise self._no_if_none_match()
                case _:
                    raise (
                        S3Error.fromxml(response)
                        if response.data
                        else InvalidResponseError(response.status, response.headers.get("content-type", ""), None)
                    )
        raise StoreError(f"store {self.url}, {key}: another writer is still at it; run again")

    def _need_if_none_match(self) -> None:
        """Without it two writers could each believe they won: found out once, on a key of our own."""
        if self._decides_races:
            return
        key = f"probe/{uuid.uuid4().hex}"
        try:
            self._put_if_absent(key, b"probe")  # False if it is a repetition: the answer to the first was lost
            if self._put_if_absent(key, b"probe"):
                raise self._no_if_none_match()
        finally:
            self._client.remove_object(self._bucket, self._prefix + key)
        self._decides_races = True

    def _no_if_none_match(self) -> StoreError:
        return StoreError(
            f"store {self.url}: {self._endpoint} ignores If-None-Match on PUT, which decides between two writers of "
            "one artifact; use a store that honours it (AWS S3, MinIO, Ceph, SeaweedFS, RustFS) or a file:// store"
        )

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except S3Error as error:
            raise StoreError(f"store {self.url}, {key}: {self._remedy(error)}") from error
        except ValueError as error:  # the client itself refuses a name
            raise UserError(f"store {self.url}, {key}: {error}; choose another bucket or prefix") from error
        except (MinioException, HTTPError) as error:
            reason = str(error).split("(Caused by ")[-1].rstrip(")")
            raise StoreError(
                f"store {self.url}: no S3 answer from {self._endpoint} ({reason}); check the endpoint and the network"
            ) from error

    def _remedy(self, error: S3Error) -> str:
        if error.code == "NoSuchBucket":
            return f"bucket {self._bucket} does not exist at {self._endpoint}; create it or correct the store's url"
        if error.code in _CREDENTIALS:
            return (
                f"{self._endpoint} refused the credentials ({error.code}); check {ENV_ACCESS_KEY} and {ENV_SECRET_KEY} "
                f"and that they may read and write bucket {self._bucket}"
            )
        if error.code in _FULL:
            return f"the store's disk is full ({error.code}); free space there, or run `rlhf artifacts gc`"
        return f"{self._endpoint} answered {error.code}: {error.message}"


def _retries(patience: float) -> urllib3.Retry:
    """Repetitions whose pauses take up to half of the patience, so that a store may start again meanwhile."""
    repetitions = 1
    while BACKOFF * (2 ** (repetitions + 1) - 2) <= patience / 2:
        repetitions += 1
    return urllib3.Retry(
        total=repetitions,
        backoff_factor=BACKOFF,
        status_forcelist=[500, 502, 503, 504],
        allowed_methods=None,  # POST too: it begins and ends an upload in parts, and deletes
        respect_retry_after_header=False,  # MinIO says a minute, to an operator that has five seconds
    )


class _InBlocks(urllib3.PoolManager):
    """Sends bodies block by block: a timeout is for each, so that it is about silence and not about a slow link."""

    def urlopen(self, method: str, url: str, redirect: bool = True, **options: Any) -> Any:  # type: ignore[override]
        if isinstance(body := options.get("body"), bytes):
            options["headers"] = urllib3.HTTPHeaderDict(options.get("headers") or {})
            options["headers"]["Content-Length"] = str(len(body))
            options["body"] = io.BytesIO(body)
        return super().urlopen(method, url, redirect, **options)


class _HashingReader:
    """Passes a file on to the uploader, taking its SHA-256 on the way."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data
