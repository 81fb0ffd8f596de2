"""Submitting jobs to two real nodes: trivial ones, one's own code, and nodes that differ."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from anycontrast.training.provenance import (
    COMMIT_NAME,
    Provenance,
    _commit,
    code_digest,
    provenance,
)

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
RUNTIME_ENV = ROOT / "recipes" / "runtime_env.yaml"
CONFIG = """\
name: job
scan: {source: phantom, dataset: phantom, split_fractions: [1.0, 0.0, 0.0],
       phantom: {num_studies: 6, spacing_mm: [8.0, 8.0, 8.0], num_sites: 2}}
prepare: {spacing_mm: [8.0, 8.0, 8.0], box_multiple_vox: 8}
model: {preset: tiny, patch_vox: [8, 8, 8]}
# One worker does not leave room for the other on its node.
cluster: {num_workers: 2, cpus_per_worker: 2.0, max_failures: 2}
pretrain: {steps: 3, log_every: 1, checkpoint_every: 3, panel_every: -1,
           stream: {studies_per_step: 4, packs_per_step: 2}}
"""


def test_the_digest_of_code_changes_with_a_name_or_a_byte_and_not_with_the_place(
    tmp_path: Path,
) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "package").mkdir(parents=True)
        (tmp_path / place / "package" / "a.py").write_text("x = 1\n")
    here, there = (tmp_path / place / "package" for place in ("here", "there"))
    assert code_digest([here]) == code_digest([there])
    (there / "a.py").write_text("x = 2\n")
    assert code_digest([here]) != code_digest([there])
    (here / "a.py").rename(here / "b.py")
    assert code_digest([here]) != code_digest([there])


def test_a_commit_is_told_only_of_files_that_git_tracks(tmp_path: Path) -> None:
    assert _commit(ROOT / "platform" / "anycontrast") != "unknown"
    # Installed into a virtual environment that lies inside a working copy.
    assert _commit(ROOT / ".cache") == "unknown"
    (tmp_path / COMMIT_NAME).write_text("0123456789ab\n")
    assert _commit(tmp_path) == "0123456789ab"


def test_the_same_code_elsewhere_does_not_differ() -> None:
    own = provenance()
    elsewhere = Provenance(own.version, "unknown", own.code, "/opt", own.torch, own.python)
    assert not own.differs_from(elsewhere)
    assert own.differs_from(Provenance(own.version, "", own.code, "/opt", "2.0.0", own.python))


def test_the_runtime_environment_uploads_what_a_job_needs_and_not_more() -> None:
    values = yaml.safe_load(RUNTIME_ENV.read_text())
    roots = values["env_vars"]["PYTHONPATH"].split(":")
    assert all((ROOT / root).is_dir() and not Path(root).is_absolute() for root in roots)
    left_out = {name.strip("/") for name in values["excludes"]}
    assert not left_out & {*roots, "recipes"}
    # A production job installs nothing while it starts.
    assert not {"pip", "conda", "uv"} & set(values)


@pytest.mark.cluster
@pytest.mark.slow
def test_nodes_that_differ_are_refused_by_name_and_one_s_own_code_reaches_all(
    ray_nodes: Callable[..., Any], tmp_path: Path
) -> None:
    nodes = ray_nodes()
    other = tmp_path / "other"
    for name in ("platform", "kernels", "datasets", "recipes"):
        shutil.copytree(nodes.code / name, other / name)
    (other / "platform" / "anycontrast" / "extra.py").write_text('"""Only here."""\n')
    roots = [str(other / name) for name in ("platform", "kernels", "datasets")]
    nodes.start(num_cpus=3)
    nodes.start(num_cpus=3, env={"PYTHONPATH": ":".join(roots)})

    start_s = time.monotonic()
    code, text = nodes.run("true")
    assert code == 0, text
    logger.info("a trivial job took %.1f s", time.monotonic() - start_s)

    config = tmp_path / "job.yaml"
    config.write_text(CONFIG)
    words = ("python", "recipes/amae_pretrain.py", str(config), f"root={tmp_path}")
    code, text = nodes.run(*words)
    assert code != 0
    assert "exit code 2" in text, text[-4000:]
    assert "anycontrast: error: node" in text
    assert f"from {other}/platform/anycontrast" in text
    assert "runtime_env.yaml" in text

    mine = other / "platform" / "anycontrast" / "__init__.py"
    mine.write_text(mine.read_text().replace('__version__ = "', '__version__ = "9.9.9+mine'))
    shutil.copy(RUNTIME_ENV, other / "recipes")
    options = ("--runtime-env", "recipes/runtime_env.yaml")
    code, text = nodes.run(*words, "name=mine", options=options, cwd=other)
    assert code == 0, text[-4000:]
    said = [line for line in text.splitlines() if "anycontrast 9.9.9+mine" in line]
    assert any("the driver runs" in line for line in said), text[-4000:]
    assert any("training amae with" in line for line in said)
    assert all("working_dir_files" in line for line in said)
