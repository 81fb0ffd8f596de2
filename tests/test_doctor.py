"""The doctor: what it says of sound and of sick machines, folders and clusters."""

import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anycontrast.doctor import judge, nodes
from anycontrast.doctor.examine import run_doctor
from anycontrast.doctor.findings import Diagnosis, Finding
from anycontrast.doctor.node import (
    Gpu,
    NodeAnswer,
    Question,
    Space,
    clean_up,
    confirm,
    examine,
    gpus,
    lockable_bytes,
    try_storage,
)
from anycontrast.training.config import load_config
from anycontrast.training.provenance import provenance

GIB = 1 << 30
GPU = Gpu("H100", 80 * GIB, 0)


def answer(node: str = "a", **changes: Any) -> NodeAnswer:
    """A sound node's answer, made up: stands for what `examine` would return there."""
    sound = NodeAnswer(
        node=node,
        ray="2.60.0",
        code=provenance(),
        gpus=(GPU,),
        shared_memory=Space(8 * GIB, 8 * GIB),
        disks={"Ray": Space(100 * GIB, 50 * GIB)},
        storage={"/runs": ""},
    )
    return replace(sound, **changes)


def states(*answers: NodeAnswer) -> dict[str, Finding]:
    return {one.check: one for one in judge.judge_nodes(answers, answer("here"))}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a memory disk of 64 KiB with some options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size=64k,{options}", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"may not mount here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_sound_nodes_are_told_so_in_one_line_each() -> None:
    found = states(answer("a"), answer("b"))
    assert {one.state for one in found.values()} == {"ok"}
    assert found["ray"].found == "Ray 2.60.0 on 2 nodes"
    text = Diagnosis("the cluster", tuple(found.values())).text()
    assert len(text.splitlines()) == len(found) + 1
    assert text.endswith("the cluster: 4 ok, 0 warn, 0 fail")


def test_another_ray_on_a_node_is_a_failure_that_names_it() -> None:
    found = states(answer("a"), answer("b", ray="2.59.1"), answer("c", ray=""))["ray"]
    assert found.state == "fail"
    assert "b: 2.59.1, c: none" in found.found
    assert "one image" in found.remedy


@pytest.mark.parametrize("version", ["2.59.9", "1.60.0", ""])
def test_a_ray_too_old_or_missing_here_is_a_failure(version: str) -> None:
    own = answer("here", ray=version)
    assert next(judge.judge_nodes([own], own)).state == "fail"


def test_other_code_on_a_node_is_a_failure_wherever_the_folder_is() -> None:
    elsewhere = replace(provenance(), folder="/opt/elsewhere", commit="unknown")
    assert states(answer("b", code=elsewhere))["code"].state == "ok"
    edited = replace(provenance(), code="0123456789ab")
    found = states(answer("b", code=edited))["code"]
    assert found.state == "fail"
    assert "b runs anycontrast" in found.found
    assert "0123456789ab" in found.found


@pytest.mark.parametrize(
    ("size", "state"), [(64 << 20, "fail"), (512 << 20, "warn"), (2 * GIB, "ok"), (None, "fail")]
)
def test_shared_memory_is_the_least_of_all_nodes(size: int | None, state: str) -> None:
    small = answer("b", shared_memory=None if size is None else Space(size, size))
    found = states(answer("a"), small)["shared memory"]
    assert found.state == state
    assert "on b" in found.found


def test_rdma_needs_memory_that_can_be_locked(tmp_path: Path) -> None:
    assert "locked memory" not in states(answer("a", lockable_bytes=8 << 20))
    rdma = answer("a", uses_rdma=True)
    assert states(rdma)["locked memory"].state == "ok"
    found = states(rdma, answer("b", uses_rdma=True, lockable_bytes=8 << 20))["locked memory"]
    assert (found.state, found.found.partition(":")[0]) == ("fail", "b may lock 8 MiB")
    assert "LimitMEMLOCK=infinity" in found.remedy
    # The capability counts only where it is effective: of user 1000 in a pod it is not.
    (tmp_path / "root").write_text("Name:\tray\nCapEff:\t0000000000004000\n")
    (tmp_path / "user").write_text("Name:\tray\nCapEff:\t0000000000000000\n")
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert lockable_bytes(tmp_path / "root") is None
    own = None if limit == resource.RLIM_INFINITY else limit
    assert lockable_bytes(tmp_path / "user") == own


@pytest.mark.parametrize(
    ("total", "free", "state"),
    [(100, 50, "ok"), (100, 10, "warn"), (100, 0, "fail"), (10000, 100, "fail")],
)
def test_a_disk_is_judged_by_what_is_free_and_by_ray_s_own_limit(
    total: int, free: int, state: str
) -> None:
    full = answer("b", disks={"Ray": Space(total * GIB, free * GIB)})
    assert states(answer("a"), full)["disk of Ray"].state == state


def test_gpus_that_ray_hands_out_but_no_driver_sees_are_a_failure() -> None:
    two = [answer("a"), answer("b", gpus=())]
    assert judge.judge_gpus(two, {"a": 1, "b": 1}).state == "fail"
    assert judge.judge_gpus(two, {"a": 0, "b": 0}).state == "warn"
    found = judge.judge_gpus(two, {"a": 1, "b": 0})
    assert (found.state, found.found) == ("ok", "1: H100 80.0 GiB")
    assert judge.judge_gpus([answer(gpus=())], {}).found == "none: CPUs and gloo"


def test_gpus_are_asked_of_the_driver_since_ray_hides_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"  # A stub: prints what the real one prints.
    lines = r"NVIDIA H100 80GB HBM3, 81559, 4\nNVIDIA GB10, [N/A], [N/A]\n"
    driver.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    first, second = gpus()
    assert (first.name, first.total_bytes >> 20, first.used_bytes >> 20) == (
        "NVIDIA H100 80GB HBM3",
        81559,
        4,
    )
    assert (second.name, second.total_bytes) == ("NVIDIA GB10", 0)
    driver.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == ()


def test_more_workers_than_the_cluster_can_hold_are_a_failure() -> None:
    have = {"CPU": 8.0, "GPU": 4.0}
    assert judge.judge_room(have, workers=4, cpus=2.0, use_gpu=True).state == "ok"
    found = judge.judge_room(have, workers=8, cpus=2.0, use_gpu=True)
    assert found.state == "fail"
    assert "16 CPUs wanted, 8 there, 8 GPUs wanted, 4 there" in found.found


@pytest.mark.parametrize(("skew_s", "state"), [(0.4, "ok"), (-5.0, "warn"), (90.0, "fail")])
def test_the_clock_farthest_off_decides(skew_s: float, state: str) -> None:
    found = judge.judge_clocks({"a": 0.01, "b": skew_s}, 0.002)
    assert found.state == state
    assert "(b)" in found.found


def test_a_node_that_goes_between_two_questions_is_a_finding_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")

    def gone(asked: object) -> None:
        raise ray.exceptions.GetTimeoutError("Get timed out")

    monkeypatch.setattr("anycontrast.doctor.nodes._skews", gone)
    found = nodes._clocks([])
    assert (found.state, found.check) == ("fail", "clocks")
    assert "Get timed out" in found.found


def test_a_finding_without_a_remedy_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        Finding("fail", "ray", "gone")


def test_a_folder_that_all_nodes_see_is_sound_and_left_as_it_was(tmp_path: Path) -> None:
    question = Question(".doctor-x", (str(tmp_path),), {"runs": str(tmp_path / "not" / "yet")})
    answers = [examine(question, node) for node in ("a", "b")]
    seen = {node: confirm(question, ["a", "b"])[str(tmp_path)] for node in ("a", "b")}
    assert judge.judge_storage(str(tmp_path), answers, seen).state == "ok"
    assert answers[0].disks["runs"].free_bytes > 0
    clean_up(question)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nodes_do_not_share_is_a_failure(tmp_path: Path) -> None:
    question = Question(".doctor-x", (str(tmp_path),))
    answers = [examine(question, "a"), answer("b", storage={str(tmp_path): ""})]
    seen = {"a": confirm(question, ["a", "b"])[str(tmp_path)], "b": ""}
    found = judge.judge_storage(str(tmp_path), answers, seen)
    assert found.state == "fail"
    assert "a does not see what b wrote" in found.found
    assert "root" in found.remedy


def test_a_full_disk_is_a_failure_that_says_so(tiny_disk: Callable[[str], Path]) -> None:
    problem = try_storage(tiny_disk("mode=777"), ".doctor-x", "a")
    assert problem == "writing: No space left on device"


def test_a_read_only_folder_is_a_failure_that_says_so(
    tiny_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_disk("ro")
    assert try_storage(folder, ".doctor-x", "a") == "making a folder: Read-only file system"
    config = load_config(None, [f"root={folder}", "cluster.mode=process"])
    diagnosis = run_doctor(config)
    assert diagnosis.is_failed
    (storage,) = [one for one in diagnosis.findings if one.check == "storage"]
    assert storage.state == "fail"
    assert "uid 1000" in storage.remedy


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert "Not a directory" in try_storage(tmp_path / "runs", ".doctor-x", "a")


def test_a_store_that_cannot_be_read_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anycontrast.doctor.machine.on_this_machine", lambda *words: 0.5)
    words = [f"root={tmp_path}", f"store.location={tmp_path / 'gone'}", "cluster.mode=process"]
    found = {one.check: one for one in run_doctor(load_config(None, words)).findings}
    assert found["store"].state == "fail"
    assert found["gloo"].state == "ok"


def test_the_address_of_the_job_port_is_told_from_one_to_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    (finding,) = run_doctor(load_config(None, [f"root={tmp_path}"])).findings
    assert finding.state == "fail"
    assert "ray job submit -- anycontrast doctor" in finding.remedy


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("Could not connect to 10.0.0.1:6379", "cluster.address"),
        ("Version mismatch: The cluster was started with:\nRay: 2.59.0", "one image"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_failure_and_no_traceback(
    message: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(address: str | None) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("anycontrast.doctor.examine._connected", refuse)
    words = [f"root={tmp_path}", "cluster.address=10.0.0.1:6379"]
    diagnosis = run_doctor(load_config(None, words))
    (finding,) = diagnosis.findings
    assert diagnosis.is_failed
    assert remedy in finding.remedy
    assert diagnosis.to_json()["failed"] is True


SCRIPT = """\
import json, sys
from anycontrast.doctor.examine import run_doctor
from anycontrast.training.config import load_config
diagnosis = run_doctor(load_config(None, sys.argv[1:]))
print("DIAGNOSIS", json.dumps(diagnosis.to_json()))
sys.exit(diagnosis.is_failed)
"""


def diagnose(nodes: Any, folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    script = folder / "ask.py"
    script.write_text(SCRIPT)
    code, text = nodes.run("python", str(script), f"root={folder / 'runs'}", *words)
    lines = [line for line in text.splitlines() if line.startswith("DIAGNOSIS")]
    assert lines, text[-3000:]  # Twice where the job failed: its log is shown again.
    found = json.loads(lines[0].removeprefix("DIAGNOSIS"))
    return code, {one["check"]: one for one in found["findings"]}


@pytest.mark.cluster
@pytest.mark.slow
def test_the_doctor_of_a_cluster_asks_every_node_and_finds_the_one_that_is_cut_off(
    ray_nodes: Callable[..., Any], tmp_path: Path
) -> None:
    nodes = ray_nodes()
    nodes.start()
    nodes.start()
    code, found = diagnose(
        nodes, tmp_path, "cluster.num_workers=4", "pretrain.stream.packs_per_step=4"
    )
    assert code == 0, found
    assert {one["state"] for one in found.values()} <= {"ok", "warn"}
    assert found["ray"]["found"].endswith("on 2 nodes")
    assert found["code"]["found"].endswith("on 2 nodes")
    assert "summed over 2 nodes" in found["gloo"]["found"]
    assert found["storage"]["found"].endswith("seen by 2 nodes")
    assert found["clocks"]["state"] == "ok"
    # A third node whose processes look for the others on an interface that is not there.
    nodes.start(env={"GLOO_SOCKET_IFNAME": "nowhere0"})
    code, found = diagnose(nodes, tmp_path, "cluster.cpus_per_worker=64")
    assert code == 1
    assert found["gloo"]["state"] == "fail"
    assert "GLOO_SOCKET_IFNAME" in found["gloo"]["remedy"]
    assert found["room"]["state"] == "fail"
    assert found["storage"]["found"].endswith("seen by 3 nodes")
