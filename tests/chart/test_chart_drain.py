"""What a worker's pod runs before it ends: taken out of the chart, run on a live Ray node."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from infra.chart_tools import manifests


@pytest.fixture(scope="module")
def nodes(ray_nodes: Callable[..., Any]) -> Any:
    """A head that places no workers, as the chart's, and one worker node."""
    made = ray_nodes()
    made.start(num_cpus=0)
    made.start(num_cpus=1)
    return made


def alive(nodes: Any) -> dict[str, str]:
    """Id of each live node by address."""
    command = ["ray", "list", "nodes", "--format=json", f"--address={nodes.address}"]
    done = subprocess.run(command, env=nodes.env, capture_output=True, text=True, check=True)
    return {n["node_ip"]: n["node_id"] for n in json.loads(done.stdout) if n["state"] == "ALIVE"}


@pytest.mark.cluster
@pytest.mark.slow
def test_the_prestop_hook_drains_the_node_within_the_time_given(
    nodes: Any, render: Any, minimal: Any, tmp_path: Path
) -> None:
    documents = render(minimal, {"drain": {"deadlineSeconds": 10, "marginSeconds": 5}}).documents
    pod = next(p for p in manifests.pod_templates(documents) if p.num_gpus)
    command = pod.containers[0]["lifecycle"]["preStop"]["exec"]["command"]
    # In a pod Ray finds the one node of the pod by itself; two nodes on one machine need naming.
    wrapper = tmp_path / "ray"
    wrapper.write_text(
        f'#!/bin/sh\nexec {nodes.bin}/ray "$@" --node-id={alive(nodes)["127.0.0.2"]}\n'
    )
    wrapper.chmod(0o755)
    env = {
        **nodes.env,
        "RAY_ADDRESS": f"127.0.0.1:{nodes.port}",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    started_s = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=90)
    took_s = time.monotonic() - started_s
    assert (done.returncode, done.stderr.count("drain refused")) == (0, 0), done.stderr
    assert took_s < pod.spec["terminationGracePeriodSeconds"]
    while "127.0.0.2" in alive(nodes):
        assert time.monotonic() - started_s < 60, "an idle node that is drained goes away"
        time.sleep(1)
    assert len(alive(nodes)) == 1


def test_a_refused_drain_does_not_hold_the_pod(render: Any, minimal: Any, tmp_path: Path) -> None:
    documents = render(minimal).documents
    pod = next(p for p in manifests.pod_templates(documents) if p.num_gpus)
    command = pod.containers[0]["lifecycle"]["preStop"]["exec"]["command"]
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ray").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0 and "resumes from its newest checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("titles", "waits"),
    [
        (["ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "sleep"], False),
        (["ray::IDLE", "ray::RayTrainWorker.execute"], True),
    ],
)
def test_the_hook_waits_for_training_processes_and_no_others(
    titles: list[str], waits: bool, render: Any, minimal: Any, tmp_path: Path
) -> None:
    documents = render(minimal, {"drain": {"deadlineSeconds": 5}}).documents
    pod = next(p for p in manifests.pod_templates(documents) if p.num_gpus)
    *shell, script = pod.containers[0]["lifecycle"]["preStop"]["exec"]["command"]
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "sleep").write_text("#!/bin/sh\necho waits >&2\nrm -r 2\n")
    for stub in ("ray", "sleep"):
        (tmp_path / stub).chmod(0o755)
    for number, title in enumerate(titles, start=1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes(title.encode() + b"\0--flag\0")
    done = subprocess.run(
        [*shell, script.replace("/proc/", f"{tmp_path}/")],
        cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    # The stub of `sleep` ends the process that is waited for.
    assert (done.returncode, done.stderr.count("waits")) == (0, int(waits)), done.stderr
