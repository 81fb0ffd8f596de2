"""Pull: from folders, a web server and an object store; whole or not at all, verified, cached."""

import functools
import http.server
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from anycontrast.cli import main
from anycontrast.release.errors import ReleaseError, ReleaseNotFoundError
from anycontrast.release.files import MANIFEST, verify_release
from anycontrast.release.hub import PullConfig, pull
from anycontrast.training.config import Config


class Server:
    """A web server on the loopback that counts what it is asked for, and can break off."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.break_off: str | None = None
        self.status = 200
        owner = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests.append(self.path)
                if owner.status != 200:
                    self.send_error(owner.status)
                elif owner.break_off and self.path.endswith(owner.break_off):
                    path = folder / self.path.lstrip("/")
                    self.send_response(200)
                    self.send_header("Content-Length", str(path.stat().st_size))
                    self.end_headers()
                    self.wfile.write(path.read_bytes()[: path.stat().st_size // 2])
                    self.close_connection = True
                else:
                    super().do_GET()

            def log_message(self, format: str, *args: Any) -> None:
                """Keep quiet."""

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def files(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self.requests}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    made = Server(folder)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def served(tiny_run: Config, tmp_path: Path, server: Server) -> Path:
    return Path(shutil.copytree(tiny_run.paths.release / "encoder", tmp_path / "served" / "enc"))


@pytest.fixture
def cache(tmp_path: Path) -> PullConfig:
    return PullConfig(cache=str(tmp_path / "cache"))


def visible(cache: PullConfig) -> list[str]:
    return sorted(p.name for p in cache.cache_dir.iterdir()) if cache.cache_dir.is_dir() else []


def _same(a: Path, b: Path) -> bool:
    return {p.name: p.read_bytes() for p in a.iterdir()} == {
        p.name: p.read_bytes() for p in b.iterdir()
    }


def test_a_folder_is_pulled_by_path_and_by_url(tiny_run: Config, cache: PullConfig) -> None:
    source = tiny_run.paths.release / "segmenter"
    path = pull(str(source), cache)
    assert _same(path, source)
    assert path.parent == cache.cache_dir
    assert path.name.startswith("tiny-segmenter-")
    assert pull(source.resolve().as_uri(), cache) == path
    assert visible(cache) == [path.name]


@pytest.mark.parametrize("name", ["a run #2 at 100%20?", "set[1]*", "a::b", "~x"])
def test_a_folder_of_any_name_is_pulled_by_its_path(
    tiny_run: Config, tmp_path: Path, cache: PullConfig, name: str
) -> None:
    source = Path(shutil.copytree(tiny_run.paths.release / "encoder", tmp_path / name / "encoder"))
    assert _same(pull(str(source), cache), source)


def test_a_release_comes_over_http(server: Server, served: Path, cache: PullConfig) -> None:
    path = pull(f"{server.url}/enc", cache)
    assert _same(path, served)
    assert visible(cache) == [path.name]


def test_a_second_pull_reads_the_manifest_only(
    server: Server, served: Path, cache: PullConfig, caplog: pytest.LogCaptureFixture
) -> None:
    first = pull(f"{server.url}/enc/", cache)
    assert server.files() == {p.name for p in served.iterdir()}
    server.requests.clear()
    with caplog.at_level("INFO"):
        assert pull(f"{server.url}/enc", cache) == first
    assert server.files() == {MANIFEST}
    assert "reused" in caplog.text


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    server: Server, served: Path, cache: PullConfig
) -> None:
    path = pull(f"{server.url}/enc", cache)
    (path / "model.safetensors").write_bytes(b"x")
    assert pull(f"{server.url}/enc", cache) == path
    verify_release(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", MANIFEST])
def test_a_transfer_that_breaks_off_leaves_nothing_visible(
    server: Server, served: Path, cache: PullConfig, name: str
) -> None:
    server.break_off = name
    with pytest.raises(ReleaseError):
        pull(f"{server.url}/enc", cache)
    assert visible(cache) == []
    server.break_off = None
    assert _same(pull(f"{server.url}/enc", cache), served)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda f: _flip(f / "model.safetensors"), "sha256 differs"),
        (lambda f: (f / "config.json").unlink(), "config.json is listed but not there"),
        (lambda f: (f / "README.md").write_bytes(b"x" * 10**6), "its manifest says"),
        (lambda f: _edit(f, lambda m: m["files"].update({"../x": m["files"]["README.md"]})), "may"),
        (lambda f: _edit(f, lambda m: m.update(format_version=99)), "format 99 is newer"),
        (lambda f: (f / MANIFEST).write_text("<html>"), "is not one"),
        (lambda f: (f / MANIFEST).write_bytes(b" " * (2**20 + 1)), "larger than 1048576 bytes"),
    ],
    ids=["flipped", "missing", "oversize", "path", "newer", "garbage", "huge manifest"],
)
def test_what_is_tampered_with_never_becomes_visible(
    server: Server,
    served: Path,
    cache: PullConfig,
    tmp_path: Path,
    tamper: Callable[[Path], object],
    message: str,
) -> None:
    tamper(served)
    before = sorted(tmp_path.rglob("*"))
    for source in (f"{server.url}/enc", str(served)):
        with pytest.raises(ReleaseError, match=message):
            pull(source, cache)
    assert visible(cache) == []
    assert sorted(p for p in tmp_path.rglob("*") if p != cache.cache_dir) == before


def test_a_release_that_says_it_is_too_large_is_not_begun(
    server: Server, served: Path, tmp_path: Path
) -> None:
    small = PullConfig(cache=str(tmp_path / "cache"), max_bytes=1000)
    with pytest.raises(ReleaseError, match=r"more than pull\.max_bytes=1000; raise it"):
        pull(f"{server.url}/enc", small)
    assert server.files() == {MANIFEST}


def test_no_more_than_the_announced_size_is_read(
    server: Server, served: Path, cache: PullConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served / "README.md").write_bytes(b"x" * 10**7)
    sizes: list[int] = []
    monkeypatch.setattr(
        "anycontrast.release.hub.check_file", lambda path, *rest: sizes.append(path.stat().st_size)
    )
    pull(f"{server.url}/enc", cache)
    announced = json.loads((served / MANIFEST).read_text())["files"]["README.md"]["size"]
    assert announced + 1 in sizes
    assert 10**7 not in sizes


def test_two_pulls_at_once_give_one_whole_release(
    server: Server, served: Path, cache: PullConfig
) -> None:
    with ThreadPoolExecutor(4) as executor:
        paths = list(executor.map(lambda _: pull(f"{server.url}/enc", cache), range(4)))
    assert len(set(paths)) == 1
    assert _same(paths[0], served)
    assert visible(cache) == [paths[0].name]


def test_what_a_killed_pull_left_is_removed_once_it_is_old(
    server: Server, served: Path, cache: PullConfig
) -> None:
    for name, age_s in ((".tiny-old", 10**6), (".tiny-new", 0)):
        (cache.cache_dir / name).mkdir(parents=True)
        stat = (cache.cache_dir / name).stat()
        os.utime(cache.cache_dir / name, (stat.st_atime, stat.st_mtime - age_s))
    path = pull(f"{server.url}/enc", cache)
    assert visible(cache) == sorted([path.name, ".tiny-new"])


def test_a_full_disk_is_said_before_the_transfer(
    server: Server, served: Path, cache: PullConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(served)._replace(free=10)
    monkeypatch.setattr("anycontrast.release.hub.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ReleaseError, match=r"10 are free in .*set pull\.cache"):
        pull(f"{server.url}/enc", cache)
    assert server.files() == {MANIFEST}


def _nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_nothing_there_and_nobody_there_are_not_found(
    server: Server, tmp_path: Path, cache: PullConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = (f"{server.url}/none", f"{_nobody()}/x", str(tmp_path / "none"), "file:///no/such")
    for source in sources:
        with pytest.raises(ReleaseNotFoundError, match="check"):
            pull(source, cache)
        assert main(["pull", source, f"pull.cache={cache.cache}"]) == 6
        err = capsys.readouterr().err
        assert err.count("anycontrast: error:") == 1
        assert "Traceback" not in err
    assert visible(cache) == []


@pytest.mark.parametrize("status", [403, 500])
def test_a_server_that_refuses_is_one_error(
    server: Server, served: Path, cache: PullConfig, status: int
) -> None:
    server.status = status
    with pytest.raises(ReleaseNotFoundError, match=f"{status}.*check the address"):
        pull(f"{server.url}/enc", cache)


def test_only_known_schemes_and_plain_folders_are_pulled(cache: PullConfig) -> None:
    with pytest.raises(ReleaseError, match="scheme 'ftp' is not one of file, http"):
        pull("ftp://x/y", cache)
    with pytest.raises(ReleaseError, match="without \\? or #"):
        pull("https://x/y?signature=secret", cache)


def test_a_password_in_an_address_is_never_shown(
    cache: PullConfig, caplog: pytest.LogCaptureFixture
) -> None:
    url = _nobody().replace("//", "//me:hunter2@")
    with caplog.at_level("DEBUG", logger="anycontrast"), pytest.raises(ReleaseError) as raised:
        pull(f"{url}/x", cache)
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in caplog.text


def test_the_cache_is_named_by_the_environment(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ANYCONTRAST_CACHE", raising=False)
    assert PullConfig().cache_dir == tmp_path / "xdg" / "anycontrast"
    monkeypatch.setenv("ANYCONTRAST_CACHE", str(tmp_path / "named"))
    path = pull(str(tiny_run.paths.release / "encoder"))
    assert path.parent == tmp_path / "named"


@pytest.mark.filterwarnings("ignore")
def test_a_release_comes_from_an_object_store(
    tiny_run: Config, cache: PullConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    import boto3

    store = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        endpoint = "http://127.0.0.1:{1}".format(*store.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="models")
        source = tiny_run.paths.release / "segmenter"
        for path in source.iterdir():
            client.upload_file(str(path), "models", f"tiny/{path.name}")
        assert _same(pull("s3://models/tiny", cache), source)
        with pytest.raises(ReleaseNotFoundError, match="no release at s3://models/none"):
            pull("s3://models/none", cache)
        with pytest.raises(ReleaseNotFoundError):
            pull("s3://nobucket/none", cache)
    finally:
        store.stop()
