"""Jobs submitted to a real Ray head of our own: they train, are refused, survive a worker."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from operator import sub
from pathlib import Path
from typing import Any

import pytest

from anycontrast.cli import guarded
from anycontrast.training import cluster
from anycontrast.training.cluster import _from_anywhere
from anycontrast.training.config import load_config
from anycontrast.training.metrics import read_metrics
from anycontrast_datasets.shard_ray import protect_own_cluster

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]

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


@pytest.fixture(scope="module")
def nodes(ray_nodes: Callable[..., Any]) -> Any:
    made = ray_nodes()
    made.start()
    return made


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
def test_a_submitted_job_pretrains_on_two_workers(nodes: Any, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "job"
    (run / "pretrain").mkdir(parents=True)
    # What a second job, started on this folder by mistake, would leave.
    (run / "pretrain" / "failure-other.json").write_text('{"kind": "ConfigError", "message": "x"}')
    code, text = nodes.run("python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}")
    assert code == 0, text[-4000:]
    assert not list((run / "pretrain").glob(".launch*"))
    assert "2 process(es)" in text
    assert text.count(f"from {nodes.code}/platform/anycontrast") >= 2, "driver and workers say it"
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
def test_the_job_port_refuses_whoever_has_no_token_or_another(nodes: Any) -> None:
    assert nodes.get("/api/jobs/", token="") == 401
    assert nodes.get("/api/jobs/", token="0" * 64) == 403
    assert nodes.get("/api/jobs/") == 200


@pytest.mark.cluster
def test_an_error_no_restart_can_mend_ends_the_job_at_once(
    nodes: Any, config: Path, tmp_path: Path
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
    code, text = nodes.run("python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}")
    assert code != 0
    assert "shard-000000.tar" in text
    assert "anycontrast: error:" in text
    assert not (tmp_path / "job" / "pretrain" / "checkpoints").exists() or not list(
        (tmp_path / "job" / "pretrain" / "checkpoints").glob("step-*")
    )


@pytest.mark.cluster
def test_a_killed_worker_is_replaced_and_the_run_reaches_its_last_step(
    nodes: Any, config: Path, tmp_path: Path
) -> None:
    steps = 600
    words = ["python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}"]
    words += [f"pretrain.steps={steps}", "pretrain.checkpoint_every=20", "pretrain.log_every=20"]
    job = nodes.submit(*words)
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
    lines_s = [row["time_s"] for row in read_metrics(tmp_path / "job/pretrain/metrics.jsonl")]
    logger.info("longest time without a step: %.1f s", max(map(sub, lines_s[1:], lines_s)))


def worker_pid(lines: list[str]) -> int | None:
    """Read the process id of rank 1 from Ray Train's announcement of the worker group."""
    for line in list(lines):
        if "world_rank=1" in line:
            return int(line.split("pid=")[-1].split(")")[0])
    return None
