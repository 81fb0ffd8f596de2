"""A submitted job meets a lost node and a drained one, and reaches its last step."""

import json
import logging
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 1000, 50
DRAIN_S = 20
logger = logging.getLogger(__name__)
CONFIG = f"""\
name: job
scan: {{source: phantom, dataset: phantom, split_fractions: [1.0, 0.0, 0.0],
       phantom: {{num_studies: 6, spacing_mm: [8.0, 8.0, 8.0], num_sites: 2}}}}
prepare: {{spacing_mm: [8.0, 8.0, 8.0], box_multiple_vox: 8}}
model: {{preset: tiny, patch_vox: [8, 8, 8]}}
cluster: {{num_workers: 2, max_failures: 1}}
pretrain: {{steps: {STEPS}, log_every: {EVERY}, checkpoint_every: {EVERY}, panel_every: -1,
           stream: {{studies_per_step: 4, packs_per_step: 2}}}}
"""


class Watched:
    """A submitted job whose lines are read while it runs."""

    def __init__(self, nodes: Any, folder: Path, *words: str) -> None:
        config = folder / "job.yaml"
        config.write_text(CONFIG)
        recipe = ("python", "recipes/amae_pretrain.py", str(config), f"root={folder}")
        self.job = nodes.submit(*recipe, *words)
        self.lines: list[tuple[float, str]] = []
        self.pretrain = folder / "job" / "pretrain"
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.job.stdout:
            self.lines.append((time.monotonic(), line))

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait_for(self, is_true: Callable[[], bool], timeout_s: float = 150) -> None:
        end_s = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < end_s and self.job.poll() is None, self.text[-4000:]
            time.sleep(0.1)

    def placed(self) -> list[str]:
        """Addresses of the workers of the newest group."""
        found = re.findall(r"\(ip=([\d.]+), pid=\d+\) world_rank=\d", self.text)
        return [str(address) for address in found]

    def steps(self) -> list[int]:
        path = self.pretrain / "metrics.jsonl"
        if not path.is_file():
            return []
        return [int(json.loads(line)["step"]) for line in path.read_text().splitlines()]

    def saved(self) -> list[int]:
        found = (self.pretrain / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(path.parent.name[5:]) for path in found)

    def end(self) -> None:
        code = self.job.wait(600)
        self.reader.join()
        assert code == 0, self.text[-4000:]


@pytest.fixture(scope="module")
def nodes(ray_nodes: Callable[..., Any]) -> Any:
    """A head that places no workers, as the chart's, and two nodes with room for all of them."""
    made = ray_nodes()
    made.start(num_cpus=0)
    made.start(num_cpus=2)
    made.start(num_cpus=2)
    return made


def node_of(nodes: Any, address: str) -> int:
    number = int(address.rpartition(".")[2]) - 1
    assert 0 < number < len(nodes.nodes), f"{address} is no worker node"
    return number


def drain_script(nodes: Any, node_id: str) -> str:
    """What the chart runs before a worker's pod ends; a pod has one node, this machine several."""
    template = (ROOT / "infra/helm/anycontrast/templates/_cluster.tpl").read_text()
    body = template.partition('{{- define "anycontrast.drainScript" -}}')[2].partition(
        "{{- end -}}"
    )
    script = body[0].replace("{{ .Values.drain.deadlineSeconds | int }}", str(DRAIN_S))
    assert "ray drain-node" in script and "{{" not in script
    which = f"ray drain-node --address=127.0.0.1:{nodes.port} --node-id={node_id}"
    return script.replace("ray drain-node", which)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_drained_node_costs_no_step_and_the_job_ends_elsewhere(
    nodes: Any, tmp_path: Path
) -> None:
    # Checkpoints only when they are asked for, and no failure allowed but lost nodes.
    rare = ("pretrain.checkpoint_every=100000", "cluster.max_failures=0")
    job = Watched(nodes, tmp_path, *rare)
    job.wait_for(lambda: bool(job.steps()))
    assert job.saved() == []
    address = job.placed()[-1]
    listed = subprocess.run(
        ["ray", "list", "nodes", "--format=json", f"--address={nodes.address}"],
        env=nodes.env,
        capture_output=True,
        text=True,
        check=True,
    )
    (node_id,) = [n["node_id"] for n in json.loads(listed.stdout) if n["node_ip"] == address]
    script = drain_script(nodes, node_id)
    with subprocess.Popen(["bash", "-c", script], env=nodes.env) as drain:
        job.wait_for(lambda: bool(job.saved()))
        (asked_for,) = job.saved()
        job.wait_for(lambda: f"resuming at step {asked_for} of {STEPS}" in job.text)
        drain.wait(120)
    job.end()
    assert job.steps() == list(range(EVERY, STEPS + 1, EVERY))
    assert job.saved()[-1] == STEPS
    assert {*job.placed()} - {address}, "the group was not placed on another node"
    nodes.start(num_cpus=2)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_whose_node_is_lost_reaches_its_last_step_on_another(
    nodes: Any, tmp_path: Path
) -> None:
    job = Watched(nodes, tmp_path)
    job.wait_for(lambda: bool(job.saved()))
    address = job.placed()[-1]
    nodes.kill(node_of(nodes, address))
    killed_s, last = time.monotonic(), job.saved()[-1]
    assert last < STEPS, "the run was over before the kill"
    job.wait_for(lambda: "resuming at step" in job.text)
    job.wait_for(lambda: job.steps()[-1] > last)
    logger.info("steps again %.1f s after the node was lost", time.monotonic() - killed_s)
    job.end()
    assert job.steps() == list(range(EVERY, STEPS + 1, EVERY))
    assert job.saved()[-1] == STEPS
    assert job.placed()[-1] != address
