"""A store in S3, as moto's server plays it, through s3fs: `python s3_episode.py`. Prints the result of each scenario.

Between them is a proxy that does what no healthy server does: it throttles, cuts downloads, lets listings lag and says
that the credentials have expired. Run by tests/e2e/test_s3.py, in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import s3fs
import urllib3
from moto.server import ThreadedMotoServer

from actserve.core.errors import StoreError
from actserve.core.signature import Signature, TensorSpec
from actserve.store.artifact import Manifest
from actserve.store.local import ModelStore
from actserve.store.remote import RemoteStore, open_store

BUCKET, URL = "bucket", "s3://bucket/store"
PROGRAM = bytes(range(256)) * 20_000  # 5 MB: several parts
SIGNATURE = Signature((TensorSpec("x", "float32", (4,)),), (TensorSpec("action", "int64", ()),), 8)
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{0}</Code><Message>{0}</Message></Error>'


class Proxy(BaseHTTPRequestHandler):
    """Forwards to `upstream`. `fault` may answer instead, or change the answer: (status, headers, body)."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    fault: Callable[[str], tuple[int, str] | None] = staticmethod(lambda _target: None)
    listings: dict[str, bytes] | None = None  # answers to listings, which stay as they are while this is set
    cut = False
    pool = urllib3.PoolManager(maxsize=16)

    def handle_one(self) -> None:
        target = f"{self.command} {self.path}"
        instead = type(self).fault(target)
        if instead is not None:
            status, code = instead
            self.reply(status, {"Content-Type": "application/xml"}, ERROR.format(code).encode())
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        answer = self.pool.request(
            self.command, self.upstream + self.path, headers=headers, decode_content=False, redirect=False
        )
        body = answer.data
        if "list-type" in self.path and self.listings is not None:
            body = self.listings.setdefault(self.path, body)
        self.reply(answer.status, dict(answer.headers), body)

    do_GET = do_HEAD = handle_one  # noqa: N815, named by http.server

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = int(headers.get("Content-Length", len(body))) if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.cut and len(body) > 100_000:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def faulty(**changes: Any) -> Iterator[None]:
    before = {name: vars(Proxy)[name] for name in changes}
    for name, value in changes.items():
        setattr(Proxy, name, staticmethod(value) if callable(value) else value)
    yield
    for name, value in before.items():
        setattr(Proxy, name, value)


def publish(folder: Path, version: int) -> None:
    """Publish a version into a folder, and upload it, manifest.json last."""
    store = ModelStore(folder)
    (folder / "built").write_bytes(PROGRAM + bytes([version]))
    manifest = Manifest(1, "walker", 0, None, "", SIGNATURE, None, {}, {}, {}, {})
    artifact = store.publish(manifest, {"policy.onnx": folder / "built"})
    s3 = boto3.client("s3", endpoint_url=Proxy.upstream)
    for file in sorted(artifact.folder.iterdir(), key=lambda path: path.name == "manifest.json"):
        s3.upload_file(str(file), BUCKET, f"store/walker/{artifact.manifest.version}/{file.name}")


def outcome(work: Callable[[], Any]) -> dict[str, Any]:
    """The result of `work` or the code of its error, and whether it took less than a minute."""
    began = time.monotonic()
    try:
        found = work()
    except StoreError as error:
        found = error.code
    return {"found": found, "soon": time.monotonic() - began < 60}


def fetched(store: RemoteStore, version: int) -> str:
    artifact = store.resolve("walker", version)
    store.verify(artifact)
    assert artifact.read("policy.onnx") == PROGRAM + bytes([version])
    return artifact.label


def scenarios(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    def opened() -> RemoteStore:
        store = open_store(URL)
        assert isinstance(store, RemoteStore)
        return store

    def refreshed(store: RemoteStore) -> list[int]:
        store.refresh()
        return store.versions("walker")

    def partial(store: RemoteStore) -> list[str]:
        return sorted(path.name for path in store.root.glob("walker/*"))

    publish(folder, 1)
    store = opened()
    yield "listed", outcome(lambda: refreshed(store))
    yield "fetched", outcome(lambda: fetched(store, 1))
    publish(folder, 2)
    refreshed(store)

    left = iter([(503, "SlowDown")] * 2)
    with faulty(fault=lambda _target: next(left, None)):
        yield "throttled for a while", outcome(lambda: fetched(store, 2))
    with faulty(fault=lambda _target: (503, "SlowDown")):
        yield "throttled for ever", outcome(lambda: refreshed(store))
    yield "after it", outcome(lambda: refreshed(store))

    publish(folder, 3)
    refreshed(store)
    with faulty(cut=True):
        yield "cut", outcome(lambda: fetched(store, 3))
        yield "cut: left behind", {"found": partial(store), "soon": True}
    yield "fetched after the cut", outcome(lambda: fetched(store, 3))

    with faulty(listings={}):
        refreshed(store)
        publish(folder, 4)
        yield "a listing that lags", outcome(lambda: refreshed(store))
    yield "a listing that has caught up", outcome(lambda: refreshed(store))

    without = lambda target: (404, "NoSuchKey") if "/5/manifest.json" in target else None  # noqa: E731
    publish(folder, 5)
    refreshed(store)
    with faulty(fault=without):
        yield "a manifest that is not there yet", outcome(lambda: fetched(store, 5))
    yield "and then is", outcome(lambda: fetched(store, 5))

    publish(folder, 6)
    refreshed(store)
    with faulty(fault=lambda _target: (403, "ExpiredToken")):
        yield "expired: listed", outcome(lambda: refreshed(store))
        yield "expired: fetched", outcome(lambda: fetched(store, 6))
        yield "expired: what was fetched before", outcome(lambda: fetched(store, 1))
        yield "expired: still listed", {"found": store.versions("walker"), "soon": True}
    yield "renewed", outcome(lambda: fetched(store, 6))


def main() -> None:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    Proxy.upstream = "http://{}:{}".format(*moto.get_host_and_port())
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy, tempfile.TemporaryDirectory() as name:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
            "AWS_MAX_ATTEMPTS": "3",  # otherwise failures for good would take minutes
            "XDG_CACHE_HOME": f"{name}/cache",
        }
        s3fs.S3FileSystem.retries = 2
        boto3.client("s3", endpoint_url=Proxy.upstream).create_bucket(Bucket=BUCKET)
        folder = Path(name, "source")
        folder.mkdir()
        json.dump(dict(scenarios(folder)), sys.stdout)
        sys.stdout.flush()
        proxy.shutdown()
    moto.stop()
    os._exit(0)  # s3fs keeps threads


if __name__ == "__main__":
    main()
