"""The SLURM script: it parses, and with a stub in the place of `srun` it trains on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "infra" / "slurm" / "pretrain.sbatch"
CONFIG = """\
name: job
scan: {source: phantom, dataset: phantom, split_fractions: [1.0, 0.0, 0.0],
       phantom: {num_studies: 6, spacing_mm: [8.0, 8.0, 8.0], num_sites: 2}}
prepare: {spacing_mm: [8.0, 8.0, 8.0], box_multiple_vox: 8}
model: {preset: tiny, patch_vox: [8, 8, 8]}
pretrain: {steps: 3, log_every: 1, checkpoint_every: 3, panel_every: -1,
           stream: {studies_per_step: 4, packs_per_step: 2}}
"""
# What stands for SLURM: no queue, no nodes; the options are taken off and the command is run.
STUBS = {
    "srun": 'while [[ "$1" == -* ]]; do if [ "$1" = -w ]; then shift; fi; shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> "$0.asked"; fi',
    "hostname": "echo 127.0.0.1",
}


def test_the_script_parses_and_asks_for_a_config() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: sbatch infra/slurm/pretrain.sbatch CONFIG" in done.stderr


def test_the_script_ends_no_ray_but_its_own() -> None:
    commands = [
        line for line in SCRIPT.read_text().splitlines() if not line.strip().startswith("#")
    ]
    assert not any("ray stop" in line or "pkill" in line for line in commands)


@pytest.mark.cluster
@pytest.mark.slow
def test_with_a_stub_of_srun_the_recipe_reaches_its_last_step(
    ray_nodes: Callable[..., Any], tmp_path: Path
) -> None:
    nodes = ray_nodes()  # None is started: its code, home and ports are used.
    stubs = nodes.folder / "stubs"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stubs / name).chmod(0o755)
    (tmp_path / "job.yaml").write_text(CONFIG)
    env = {k: v for k, v in nodes.env.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "job.yaml"), f"root={tmp_path}"],
        cwd=nodes.code,
        env={
            **env,
            "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_CPUS_PER_TASK": "2",
            "RAY_PORT": str(nodes.port),
            "RAY_DASHBOARD_PORT": str(nodes.dashboard_port),
            "RAY_TMPDIR": str(nodes.folder / "r"),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "job/pretrain/checkpoints/step-00000003/manifest.json").is_file()
    assert "1 process(es)" in done.stdout + done.stderr
