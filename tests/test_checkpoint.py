"""Checkpoints: whole or absent, verified, pruned with care; one job per run folder."""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anycontrast.training import checkpoint
from anycontrast.training.checkpoint import (
    CheckpointError,
    find_resumable,
    latest,
    load_model,
    load_optimizer,
    load_weights,
    prune,
    save,
    sweep,
)
from anycontrast.training.rng import read_rng, write_rng
from anycontrast.training.run_lock import RunLock
from anycontrast_datasets.files import sync_path

ROOT = Path(__file__).parents[1]
FILES = (
    "model.safetensors",
    "state.json",
    "engine/optimizer-00000-of-00001.safetensors",
    "engine/rng-00000.json",
    "manifest.json",
)


class StillEngine:
    """Weights and moments that say which step they are of; what `save` needs of an engine."""

    stage = 1
    skipped_steps = 0

    def __init__(self, step: int) -> None:
        self.step = step
        self.loaded: dict[str, Tensor] = {}

    def full_state_dict(self) -> dict[str, Tensor]:
        value = torch.full((4, 5), float(self.step))
        return {"weight": value, "tied": value}

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"weight/{m}": torch.full((4, 5), self.step + 0.5) for m in ("exp_avg", "exp_avg_sq")
        }

    def applied_steps(self) -> int:
        return self.step

    def load_optimizer_state(self, moments: dict[str, Tensor], applied_steps: int) -> None:
        self.loaded = {name: moments[name] for name in ("weight/exp_avg", "weight/exp_avg_sq")}
        self.step = applied_steps


def write(root: Path, step: int, **options: Any) -> Path:
    engine: Any = StillEngine(step)
    return save(root, engine, step=step, state={"kind": "amae", "model_config": {}}, **options)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_saved_checkpoint_is_found_and_loads(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path == tmp_path / "step-00000007"
    assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == set(FILES)
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.state["kind"]) == (7, path, "amae")
    assert (found.state["world_size"], found.state["zero_stage"]) == (1, 1)
    for place in (path, tmp_path):
        weights, state = load_weights(place)
        assert torch.equal(weights["tied"], torch.full((4, 5), 7.0))
        assert state == found.state
    engine: Any = StillEngine(0)
    load_optimizer(found, engine)
    assert engine.step == 7
    assert torch.equal(engine.loaded["weight/exp_avg"], torch.full((4, 5), 7.5))


def test_no_checkpoint_is_none_to_find_and_an_error_to_load(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="nowhere"):
        load_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    write(tmp_path, 5)
    newest = write(tmp_path, 6)
    damage(newest / name, how)
    with caplog.at_level(logging.WARNING):
        found = latest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert Path(name).name in caplog.text
    assert "step-00000006" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000006"):
        load_weights(newest)


def test_every_single_flipped_bit_of_a_seeded_hundred_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    rng = random.Random(0)
    for _ in range(100):
        target = path / rng.choice(FILES)
        content = target.read_bytes()
        spoiled = bytearray(content)
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        target.write_bytes(spoiled)
        assert latest(tmp_path) is None, target
        target.write_bytes(content)
    assert latest(tmp_path) is not None


def test_a_manifest_that_leads_outside_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 1)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    manifest["sha256"] = checkpoint._digest(manifest["files"])
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest"):
        load_weights(path)


def test_a_failed_write_leaves_earlier_checkpoints_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000002.*No space left.*untouched"):
        write(tmp_path, 2)
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_the_manifest_is_durable_before_the_name_and_the_name_before_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    events: list[str] = []
    fsync, rename = sync_path, Path.rename

    def log_fsync(path: Path) -> None:
        events.append(f"fsync {path.name.partition('.tmp')[0]}")
        fsync(path)

    def log_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {Path(target).name.partition('.removed')[0]}")
        return rename(self, target)

    monkeypatch.setattr(checkpoint, "sync_path", log_fsync)
    monkeypatch.setattr(Path, "rename", log_rename)
    write(tmp_path, 2, keep_last=1)
    order = [
        "fsync model.safetensors",
        "fsync manifest.json",
        "fsync step-00000002",
        "rename step-00000002",
        f"fsync {tmp_path.name}",
        "rename step-00000001",
    ]
    assert [event for event in events if event in order] == order


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert write(tmp_path, 3) == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


def test_pruning_keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step, keep_last=2, pinned=frozenset({"step-00000002"}))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (2, 5, 6)]
    prune(tmp_path, keep_last=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_resuming_sets_damaged_checkpoints_aside_so_that_pruning_keeps_whole_ones(
    tmp_path: Path,
) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2) / "model.safetensors", "flipped")
    damage(write(tmp_path, 3) / "model.safetensors", "missing")
    found = find_resumable(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(list(tmp_path.glob("*.damaged-*"))) == 2
    prune(tmp_path, keep_last=1)
    assert write(tmp_path, 2, keep_last=1) == tmp_path / "step-00000002"
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_training_does_not_start_over_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    assert find_resumable(tmp_path) is None
    damage(write(tmp_path, 1) / "model.safetensors", "flipped")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        find_resumable(tmp_path)


def test_leftovers_of_a_killed_save_are_ignored_and_swept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    leftover = tmp_path / "step-00000002.tmp-abcd1234"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 1
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = latest(tmp_path)
    assert found is not None
    with pytest.raises(CheckpointError, match="not of the configured model"):
        load_model(found, nn.Linear(2, 2))


def test_generator_states_come_back_exactly(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.standard_normal()
    write_rng(tmp_path / "rng.json")
    drawn = [(random.random(), np.random.standard_normal(), torch.rand(2).tolist())]
    read_rng(tmp_path / "rng.json")
    assert [(random.random(), np.random.standard_normal(), torch.rand(2).tolist())] == drawn


# Saves step after step until it is killed; prints a line when it is under way.
_SAVER = """
import sys
from pathlib import Path
import torch
from anycontrast.training.checkpoint import save

class Engine:
    stage, skipped_steps = 1, 0
    def __init__(self, step): self.step = step
    def full_state_dict(self): return {"w": torch.full((256, 256), float(self.step))}
    def optimizer_state(self): return {"w/exp_avg": torch.full((256, 256), float(self.step))}
    def applied_steps(self): return self.step

print("ready", flush=True)
for step in range(1, 100000):
    save(Path(sys.argv[1]), Engine(step), step=step, state={"kind": "amae"}, keep_last=2)
"""


def test_killed_anywhere_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in ("platform", "kernels", "datasets"))
    rng = random.Random(0)
    for attempt in range(3):
        root = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(root)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 30
        while not list(root.glob("step-????????")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = latest(root)
        assert found is not None
        weights, state = load_weights(found.path)
        assert set(weights["w"].flatten().tolist()) == {float(found.step)} == {float(state["step"])}
        sweep(root)
        assert all(p.name.count(".") == 0 for p in root.iterdir())


def test_a_second_job_on_a_run_folder_is_refused(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"),
        RunLock(tmp_path),
    ):
        pass
    with RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gone", "pid reused"])
def test_a_lock_of_a_dead_process_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with RunLock(tmp_path) as lock:
        holder = json.loads(lock.path.read_text())
    if kind == "gone":
        done = subprocess.Popen([sys.executable, "-c", ""])
        done.wait()
        holder["pid"] = done.pid
    else:
        holder["started"] = "1"
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        assert "taking over" in caplog.text


RIVALS = """
import os, sys, time
from pathlib import Path
from anycontrast.training.checkpoint import CheckpointError
from anycontrast.training.run_lock import RunLock

folder, delay_s, has_links = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "links"
num_rivals = 4

def no_link(*paths):
    raise PermissionError(1, "Operation not permitted")

class Rival(RunLock):
    def _is_abandoned(self, holder):
        answer = super()._is_abandoned(holder)
        (folder / f"judged-{self.number}").touch()
        while len(list(folder.glob("judged-*"))) < num_rivals:
            time.sleep(0.001)
        time.sleep(self.number * delay_s)
        return answer

def compete(number):
    lock = Rival(folder)
    lock.number = number
    try:
        with lock:
            time.sleep(num_rivals * delay_s + 0.5)
    except CheckpointError:
        return 3
    return 0

if not has_links:
    os.link = no_link
children = []
for number in range(num_rivals):
    child = os.fork()
    if child == 0:
        os._exit(compete(number))
    children.append(child)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.parametrize("links", ["links", "no links"])
@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_one_of_several_processes_takes_over_a_dead_lock(
    tmp_path: Path, delay_s: float, links: str
) -> None:
    dead = {"host": socket.gethostname(), "pid": os.getpid(), "started": "1", "since": "then"}
    (tmp_path / "run.lock").write_text(json.dumps(dead))
    words = [sys.executable, "-c", RIVALS, str(tmp_path), str(delay_s), links]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[0, 3, 3, 3]", done.stderr
    assert {p.name.partition("-")[0] for p in tmp_path.iterdir()} == {"judged"}


def test_a_lock_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*paths: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    with (
        RunLock(tmp_path),
        pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"),
        RunLock(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_takeover_that_died_names_the_file_to_remove(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 0}))
    (tmp_path / "run.lock.claim").touch()
    with pytest.raises(CheckpointError, match=r"remove .*run\.lock\.claim"), RunLock(tmp_path):
        pass


def test_a_silent_lock_of_another_host_is_taken_over_and_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "now"}))
    with RunLock(tmp_path, silent_s=0.2):
        pass
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "now"}))
    touched = iter(range(10**6))
    monkeypatch.setattr(RunLock, "_touched", lambda self: next(touched))
    with pytest.raises(CheckpointError, match="elsewhere"), RunLock(tmp_path, silent_s=0.2):
        pass
