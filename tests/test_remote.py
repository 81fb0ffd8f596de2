"""Stores behind addresses: a real S3 server, a web server with faults, and who may be asked."""

import hashlib
import multiprocessing
import pickle
import random
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from anycontrast.models.patches import patch_codes
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store.byte_source import UNREACHABLE, check_name, parse_location
from anycontrast_datasets.store.cache import CacheConfig
from anycontrast_datasets.store.codec import checksum
from anycontrast_datasets.store.reader import StudyStore, open_store
from anycontrast_datasets.store.remote import RemoteSource, RetryPolicy
from anycontrast_datasets.store.volume_store import VolumeStore
from anycontrast_datasets.stream import StudyStream
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import ShardError, StudyArrays

StudyOf = Callable[..., StudyArrays]
QUICK = RetryPolicy(first_wait_s=0.002, request_s=0.25, total_s=5.0)
NUM_STUDIES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, study_of: StudyOf) -> Path:
    """Six studies of three contrasts in two shards."""
    path = tmp_path_factory.mktemp("remote") / "shards"
    studies = []
    for number in range(NUM_STUDIES):
        rng = np.random.default_rng(number)
        codes = {
            name: rng.integers(0, 4000, size=(16, 8, 24)).astype(np.int16)
            for name in ("T1w", "FLAIR", "ADC")
        }
        studies.append(study_of(codes, f"case-{number}"))
    write_arrays(path, [studies[:4], studies[4:]])
    return path


class FaultServer:
    """Serves a folder by byte range; a seeded share of the answers is faulty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, float] = {}
        """Kind -> share of the requests for shards."""
        self.status: int | None = None
        """Of every answer, if set."""
        self.redirect: str | None = None
        self.requests: Counter[str] = Counter()
        self.random = random.Random(5)
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # Clients that gave up are what is tested.

        self._httpd = Server(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_port}/data"

    def close(self) -> None:
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.split("?")[0].rpartition("/")[2]
        fault = self._fault(name)
        if self.redirect:
            handler.send_response(302)
            handler.send_header("Location", self.redirect)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        path = self.folder / name
        status = self.status or (503 if fault == "503" else 206 if path.is_file() else 404)
        if fault == "reset":
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            handler.close_connection = True
            handler.connection.close()
            return
        body = bytearray(self._range(handler, path) if status == 206 else b"no")
        if fault == "stall":
            time.sleep(2 * QUICK.request_s)
        if fault == "wrong":
            body[len(body) // 2] ^= 0x10
        announced = len(body) // 2 if fault == "short" else len(body)
        if fault in ("short", "cut"):
            del body[len(body) // 2 :]
        handler.send_response(status)
        handler.send_header("Content-Length", str(announced))
        handler.end_headers()
        handler.wfile.write(body)
        if fault == "cut":
            handler.close_connection = True

    def _fault(self, name: str) -> str:
        with self.lock:
            self.requests[name] += 1
            draw = self.random.random()
        for kind, share in self.faults.items():
            draw -= share
            if draw < 0 and name.endswith(".tar"):
                return kind
        return ""

    def _range(self, handler: BaseHTTPRequestHandler, path: Path) -> bytes:
        first, last = handler.headers["Range"].removeprefix("bytes=").split("-")
        return path.read_bytes()[int(first) : int(last) + 1]


@pytest.fixture
def server(folder: Path) -> Iterator[FaultServer]:
    server = FaultServer(folder)
    yield server
    server.close()


def open_quickly(url: str, cache: CacheConfig | None = None) -> VolumeStore:
    return VolumeStore(RemoteSource(parse_location(url), QUICK), cache=cache)


def voxel_hash(store: StudyStore, order: list[int]) -> str:
    digest = hashlib.sha256()
    for index in order:
        arrays = store.read(index)
        digest.update(arrays.record.study_id.encode())
        for name, codes in arrays.codes.items():
            digest.update(name.encode() + codes.tobytes())
    return digest.hexdigest()


ORDER = random.Random(1).choices(range(NUM_STUDIES), k=60)


@pytest.mark.filterwarnings("ignore")
def test_studies_come_from_an_object_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    import boto3

    endpoint_server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    endpoint_server.start()
    try:
        endpoint = "http://127.0.0.1:{1}".format(*endpoint_server.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="data")
        for path in folder.iterdir():
            client.upload_file(str(path), "data", f"brains/{path.name}")
        local = open_store(folder)
        cache = CacheConfig(folder=str(tmp_path / "cache"))
        for store in (open_store("s3://data/brains"), open_store("s3://data/brains/", cache=cache)):
            assert store.fingerprint == local.fingerprint and len(store) == NUM_STUDIES
            assert voxel_hash(store, ORDER[:4]) == voxel_hash(local, ORDER[:4])
            assert store.verify() == []
            with ThreadPoolExecutor(4) as pool:
                reads = list(pool.map(store.read, range(NUM_STUDIES)))
            assert [r.record.study_id for r in reads] == [f"case-{n}" for n in range(NUM_STUDIES)]
        with pytest.raises(ShardError, match=r"s3://data/none must hold dataset\.json"):
            open_store("s3://data/none")
        with pytest.raises(ShardError, match=r"must hold dataset\.json"):
            open_store("s3://nobucket/none")
        client.delete_object(Bucket="data", Key="brains/shard-000000.tar")
        with pytest.raises(ShardError, match=r"shard-000000\.tar is missing from s3://data") as e:
            open_store("s3://data/brains").read(0)
        assert e.value.code == UNREACHABLE
    finally:
        endpoint_server.stop()


@pytest.mark.parametrize("cached", [False, True])
def test_a_failing_server_changes_nothing_but_the_time(
    folder: Path, server: FaultServer, tmp_path: Path, cached: bool
) -> None:
    clean = voxel_hash(open_store(folder), ORDER)
    store = open_quickly(server.url, CacheConfig(folder=str(tmp_path)) if cached else None)
    server.faults = {"503": 0.05, "reset": 0.04, "short": 0.04, "cut": 0.04, "wrong": 0.05}
    server.faults["stall"] = 0.01
    if cached:
        server.faults = {kind: 2 * share for kind, share in server.faults.items()}
    assert voxel_hash(store, ORDER) == clean
    num_requests = sum(n for name, n in server.requests.items() if name.endswith(".tar"))
    assert num_requests > (NUM_STUDIES if cached else len(ORDER))
    if cached:
        assert num_requests < 10 * NUM_STUDIES


def test_a_stream_over_a_failing_server_serves_what_the_clean_run_served(
    folder: Path, server: FaultServer, tmp_path: Path
) -> None:
    def served(store: StudyStore) -> list[tuple[tuple[str, ...], str]]:
        config = StreamConfig(studies_per_step=3, num_threads=3, prefetch_steps=1)
        with StudyStream(store, config, (8, 8, 8), seed=4) as stream:
            packs = [next(stream).packs[0] for _ in range(8)]
        return [(p.study_ids, checksum(patch_codes(p).numpy().tobytes())) for p in packs]

    clean = served(open_store(folder))
    store = open_quickly(server.url, CacheConfig(folder=str(tmp_path), max_bytes=90_000))
    server.faults = {"503": 0.1, "reset": 0.05, "short": 0.05, "cut": 0.05, "wrong": 0.05}
    assert served(store) == clean
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bytes")) <= 90_000
    assert server.requests.total() > NUM_STUDIES


def test_one_study_is_one_request(server: FaultServer) -> None:
    store = open_quickly(server.url)
    before = server.requests.total()
    store.read(2)
    store.read(3, contrasts=["T1w"])
    assert server.requests.total() - before == 2


def test_bytes_that_stay_wrong_are_named_after_five_tries(server: FaultServer) -> None:
    store = open_quickly(server.url)
    server.faults = {"wrong": 1.0}
    with pytest.raises(ShardError, match=r"case-1, member .*xxh3 must be") as error:
        store.read(1)
    assert error.value.code == "shard_corrupt"
    assert server.requests["shard-000000.tar"] == 5


@pytest.mark.parametrize("fault", ["503", "reset", "short", "cut"])
def test_a_server_that_stays_broken_is_given_up_after_five_tries(
    server: FaultServer, fault: str
) -> None:
    store = open_quickly(server.url)
    server.faults = {fault: 1.0}
    with pytest.raises(ShardError, match=r"case-1.*failed .* after 5 tries.*run again") as error:
        store.read(1)
    assert error.value.code == UNREACHABLE
    assert "anycontrast shard" not in str(error.value)
    # The web client opens a new connection by itself when one that it kept is reset.
    assert server.requests["shard-000000.tar"] == (10 if fault == "reset" else 5)


def test_all_tries_together_end_in_time(server: FaultServer) -> None:
    policy = RetryPolicy(first_wait_s=0.3, request_s=0.2, total_s=0.8)
    store = VolumeStore(RemoteSource(parse_location(server.url), policy))
    server.faults = {"stall": 1.0}
    started = time.monotonic()
    with pytest.raises(ShardError, match="FSTimeoutError"):
        store.read(0)
    assert time.monotonic() - started < 4
    assert 1 <= server.requests["shard-000000.tar"] < 5


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_refusals_are_final_at_once(server: FaultServer, status: int) -> None:
    store = open_quickly(server.url)
    server.status = status
    with pytest.raises(ShardError) as error:
        store.read(0)
    assert error.value.code == UNREACHABLE
    assert server.requests["shard-000000.tar"] == 1


def test_nobody_there_is_one_clear_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ShardError, match=r"reading dataset\.json from http://127.*after 5 tries"):
        VolumeStore(RemoteSource(parse_location(f"http://127.0.0.1:{port}/x"), QUICK))


def test_redirects_lead_nowhere_else(server: FaultServer, folder: Path) -> None:
    store = open_quickly(server.url)
    other = FaultServer(folder)
    try:
        for target in (other.url, "http://10.0.0.1/x", "file:///etc/passwd", "https://127.0.0.1/x"):
            server.redirect = target
            with pytest.raises(ShardError, match=r"127\.0\.0\.1 sends us on"):
                store.read(0)
        assert other.requests.total() == 0
    finally:
        other.close()


def test_a_server_without_ranges_is_named_before_its_body_is_read(server: FaultServer) -> None:
    store = open_quickly(server.url)
    server.status = 200
    original = server._range
    server._range = lambda handler, path: path.read_bytes()  # type: ignore[method-assign]
    server.status = None
    with pytest.raises(ShardError, match="must serve byte ranges"):
        store.read(1)
    server._range = original  # type: ignore[method-assign]


def test_secrets_of_an_address_are_sent_and_never_shown(
    server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url.replace("//", "//me:hunter2@") + "?sig=topsecret%2Bkey"
    store = open_quickly(url)
    assert store.read(0).record.study_id == "case-0"
    messages = []
    for server.faults, server.status in (({"503": 1.0}, None), ({}, 403), ({}, 404)):
        with caplog.at_level("DEBUG", logger="anycontrast_datasets"):
            with pytest.raises(ShardError) as error:
                store.read(0)
            messages.append(repr(error.value) + repr(error.value.__cause__))
    shown = " ".join([*messages, caplog.text])
    assert "127.0.0.1" in shown
    assert not any(word in shown for word in ("hunter2", "topsecret", "sig="))


@pytest.mark.parametrize("method", ["spawn", "fork"])
# Forking beside the loop's thread is what is tested.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_remote_store_travels_to_another_process(server: FaultServer, method: str) -> None:
    store = open_quickly(server.url)
    store.read(0)
    assert pickle.loads(pickle.dumps(store)).read(1).record.study_id == "case-1"
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_id, (store, 5)) == "case-5"
    assert store.read(2).record.study_id == "case-2"


def read_id(store: StudyStore, index: int) -> str:
    return store.read(index).record.study_id


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("pipe:cat /etc/passwd", "'pipe:' is not one of"),
        ("pipe://cat", "'pipe:' is not one of"),
        ("ftp://host/x", "'ftp:'"),
        ("github://a:b@main/x", "'github:'"),
        ("simplecache::s3://bucket/x", "'simplecache:'"),
        ("https://host/x::s3://bucket", "without #"),
        ("http://example.org/x", "plain http"),
        ("http://127.0.0.1.example.org/x", "plain http"),
        ("https://host/x#part", "without #"),
        ("s3://bucket/x?versionId=1", "without #"),
        ("s3://key:secret@bucket/x", "keys belong"),
        ("s3:///x", "s3://bucket/folder"),
        ("file://server/share", "another machine"),
        (Path("s3://bucket/x"), "lost a slash"),
    ],
)
def test_addresses_that_may_not_be_opened_are_refused_before_anything_is(
    address: str | Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(fsspec, "filesystem", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(ShardError, match=why) as error:
        open_store(address)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("gs://bucket/a/b/", "gs://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("https://me:pw@host:8443/x/?sig=1", "https://me:pw@host:8443/x"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("file:///a/b%20c", "/a/b c"),
        ("/a/b", "/a/b"),
        ("./odd:name", "./odd:name"),
    ],
)
def test_addresses_that_may_be_opened(address: str, base: str) -> None:
    place = parse_location(address)
    assert place.base == base
    assert "pw" not in place.shown and "sig" not in place.shown


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_library_is_named_with_its_remedy() -> None:
    with pytest.raises(ShardError, match=r"anycontrast\[gcs\]"):
        open_store("gs://bucket/x")


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "/a", "a/../b", "a//b", "a\\b", "a\0", "a\n", "./a", "é", "a:b"]
)
def test_names_that_lead_out_of_a_store_are_refused(name: str) -> None:
    with pytest.raises(ShardError, match="no file name of a store"):
        check_name(name)


def test_a_store_in_memory_and_behind_a_file_address(folder: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/shards-test/{path.name}", path.read_bytes())
    try:
        stored = open_store("memory://shards-test")
        assert voxel_hash(stored, [3, 1]) == voxel_hash(open_store(folder), [3, 1])
        memory.pipe_file("/shards-test/dataset.json", b"{" * 100)
        with pytest.raises(ShardError, match="is damaged"):
            open_store("memory://shards-test")
    finally:
        memory.rm("/shards-test", recursive=True)
    copy = shutil.copytree(folder, tmp_path / "with space")
    cache = CacheConfig(folder=str(tmp_path / "cache"))
    mounted = open_store(f"file://{copy}", cache=cache)
    assert voxel_hash(mounted, [0, 5]) == voxel_hash(open_store(folder), [0, 5])
    (copy / "shard-000000.tar").unlink()
    assert mounted.read(0).record.study_id == "case-0"
