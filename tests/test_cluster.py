"""A real Ray head of our own (own ports, temporary folder, token) and jobs submitted to it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from anycontrast.cli import guarded
from anycontrast.training import cluster
from anycontrast.training.cluster import _from_anywhere
from anycontrast.training.config import load_config
from anycontrast_datasets.shard_ray import protect_own_cluster

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

CONFIG = """\
name: job
scan: {source: phantom, dataset: phantom, split_fractions: [1.0, 0.0, 0.0],
       phantom: {num_studies: 6, spacing_mm: [8.0, 8.0, 8.0], num_sites: 2}}
prepare: {spacing_mm: [8.0, 8.0, 8.0], box_multiple_vox: 8}
model: {preset: tiny, patch_vox: [8, 8, 8]}
cluster: {num_workers: 2, max_failures: 2}
pretrain: {steps: 6, log_every: 1, checkpoint_every: 2, panel_every: -1,
           stream: {studies_per_step: 4, packs_per_step: 2}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Head:
    address: str
    env: dict[str, str]

    def submit(self, *words: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--address", self.address, "--", *words],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Socket paths are limited to about 100 characters, so not pytest's own temporary folder.
    temporary = tempfile.mkdtemp(prefix="ac-ray-", dir="/tmp")
    home = Path(temporary) / "home"
    home.mkdir()
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_NUM_THREADS": "1",
    }
    dashboard = free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4"]
    command += [f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={free_port()}", "--dashboard-host=127.0.0.1"]
    command += [f"--temp-dir={temporary}/r", "--node-ip-address=127.0.0.1"]
    with (Path(temporary) / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            started = Head(f"http://127.0.0.1:{dashboard}", env)
            wait_for(started)
            yield started
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def wait_for(head: Head, timeout_s: float = 90) -> None:
    end_s = time.monotonic() + timeout_s
    request = urllib.request.Request(
        f"{head.address}/api/version",
        headers={"Authorization": f"Bearer {head.env['RAY_AUTH_TOKEN']}"},
    )
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the Ray head did not answer")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(CONFIG)
    return path


def losses(run: Path) -> dict[int, float]:
    lines = (run / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return {int(row["step"]): float(row["loss"]) for row in map(json.loads, lines)}


def test_paths_of_the_run_reach_workers_that_start_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sent = _from_anywhere(load_config(None, ["root=runs", "pretrain.init_from=old/step-00000001"]))
    assert sent.root == str(tmp_path / "runs")
    assert sent.pretrain.init_from == str(tmp_path / "old" / "step-00000001")
    assert _from_anywhere(load_config(None)).pretrain.init_from is None


def test_the_keyboard_ends_a_run_on_ray_as_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    protect_own_cluster()  # Other tests of this process start clusters, and Ray is imported here.

    def ended_by_ray(trainer: object) -> None:
        raise SystemExit(0)  # What Ray Train's own handler of SIGINT does.

    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    monkeypatch.setattr(cluster, "_ray", lambda config: nullcontext())
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", ended_by_ray)
    config = load_config(None, [f"root={tmp_path}", "cluster.mode=ray"])
    assert guarded(lambda: cluster.launch(config)) == 130
    assert capsys.readouterr().err.endswith("anycontrast: interrupted: stopped by the keyboard\n")


@pytest.mark.cluster
def test_a_submitted_job_pretrains_on_two_workers(head: Head, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "job"
    (run / "pretrain").mkdir(parents=True)
    # What a second job, started on this folder by mistake, would leave.
    (run / "pretrain" / "failure-other.json").write_text('{"kind": "ConfigError", "message": "x"}')
    done = head.submit("python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert not list((run / "pretrain").glob(".launch*"))
    assert "2 process(es)" in done.stdout
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    state = json.loads((run / "pretrain/checkpoints/step-00000006/state.json").read_text())
    assert state["world_size"] == 2
    # The same job in one plain process takes the same steps: placement does not touch the order.
    plain = subprocess.run(
        [
            sys.executable,
            "recipes/amae_pretrain.py",
            str(config),
            f"root={tmp_path}",
            "name=plain",
            "cluster.num_workers=1",
            "cluster.mode=process",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr[-2000:]
    for step, loss in losses(tmp_path / "plain").items():
        assert losses(run)[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.cluster
def test_the_job_port_refuses_whoever_has_no_token(head: Head) -> None:
    request = urllib.request.Request(
        f"{head.address}/api/jobs/",
        data=json.dumps({"entrypoint": "true"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 401
    refused.value.close()


@pytest.mark.cluster
def test_an_error_no_restart_can_mend_ends_the_job_at_once(
    head: Head, config: Path, tmp_path: Path
) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "anycontrast.cli", "scan", str(config), f"root={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    subprocess.run(
        [sys.executable, "-m", "anycontrast.cli", "shard", str(config), f"root={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    shard = tmp_path / "job" / "shards" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    for position in range(2000, len(data), 4000):
        data[position] ^= 0x10
    shard.write_bytes(bytes(data))
    done = head.submit("python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}")
    assert done.returncode != 0
    assert "shard-000000.tar" in done.stdout
    assert "anycontrast: error:" in done.stdout
    assert not (tmp_path / "job" / "pretrain" / "checkpoints").exists() or not list(
        (tmp_path / "job" / "pretrain" / "checkpoints").glob("step-*")
    )


@pytest.mark.cluster
def test_a_killed_worker_is_replaced_and_the_run_reaches_its_last_step(
    head: Head, config: Path, tmp_path: Path
) -> None:
    steps = 600
    words = ["python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}"]
    words += [f"pretrain.steps={steps}", "pretrain.checkpoint_every=20", "pretrain.log_every=20"]
    job = subprocess.Popen(
        [str(BIN / "ray"), "job", "submit", "--address", head.address, "--", *words],
        env=head.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert job.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(job.stdout or []))
    reader.start()
    checkpoints = tmp_path / "job" / "pretrain" / "checkpoints"
    end_s = time.monotonic() + 120
    while not (worker := worker_pid(lines)) or not any(checkpoints.glob("step-*/manifest.json")):
        assert time.monotonic() < end_s and job.poll() is None, "".join(lines)[-4000:]
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    killed_at = max(int(p.name[5:]) for p in checkpoints.glob("step-*[0-9]"))
    assert killed_at < steps, "the run was over before the kill"
    assert job.wait(240) == 0, "".join(lines)[-4000:]
    reader.join()
    job.stdout.close()
    text = "".join(lines)
    assert (checkpoints / f"step-{steps:08d}" / "manifest.json").is_file()
    assert sorted(losses(tmp_path / "job")) == list(range(20, steps + 1, 20))
    assert text.count("world_rank=1") >= 2, "the worker group was not started again"


def worker_pid(lines: list[str]) -> int | None:
    """Read the process id of rank 1 from Ray Train's announcement of the worker group."""
    for line in list(lines):
        if "world_rank=1" in line:
            return int(line.split("pid=")[-1].split(")")[0])
    return None
