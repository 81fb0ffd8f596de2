"""One complete tiny run, made once: every stage a user calls, on phantom studies of 8 mm."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from anycontrast.training.config import Config

TINY_RUN = """\
name: tiny
root: {root}
scan:
  source: phantom
  dataset: phantom
  check_pictures: false
  split_fractions: [0.4, 0.3, 0.3]
  split_salt: c
  phantom:
    num_studies: 10
    spacing_mm: [8.0, 8.0, 8.0]
    num_sites: 2
    always: [DWI, ADC]
    keep_probability: {{T1w: 0.6, FLAIR: 0.6}}
    lesion_fraction: 1.0
prepare: {{spacing_mm: [8.0, 8.0, 8.0], box_multiple_vox: 8}}
shard: {{studies_per_shard: 5}}
model: {{preset: tiny, width: 64, num_heads: 1, depth: 4, patch_vox: [8, 8, 8]}}
cluster: {{mode: process}}
pretrain:
  steps: 4
  log_every: 1
  checkpoint_every: 2
  panel_every: -1
  stream: {{studies_per_step: 2}}
  optim: {{warmup_steps: 1}}
finetune:
  steps: 4
  log_every: 1
  checkpoint_every: 4
  panel_every: -1
  studies_per_step: 1
  contrasts: [DWI, ADC]
  max_validation_studies: 1
  overlap: 0.0
  optim: {{warmup_steps: 1}}
  segmenter:
    regions: {{lesion: [1, 2, 3, 4], core: [1, 3]}}
    window_vox: [16, 16, 16]
    feature_size: 4
evaluate: {{contrasts: [DWI, ADC], overlap: 0.0, num_bootstrap: 20, max_studies: 1}}
pull: {{cache: {root}/cache}}
"""


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_tiny_yaml() -> Callable[[Path], Path]:
    """Write the tiny run's config with another `root`; returns the YAML file."""

    def write(folder: Path) -> Path:
        path = folder / "tiny.yaml"
        path.write_text(TINY_RUN.format(root=folder / "runs"))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_yaml(
    tmp_path_factory: pytest.TempPathFactory, write_tiny_yaml: Callable[[Path], Path]
) -> Path:
    """The config file of `tiny_run`."""
    return write_tiny_yaml(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_run(tiny_yaml: Path) -> "Config":
    """A finished run: scan, shard, pretrain, finetune twice, evaluate, export. Do not damage it."""
    from anycontrast import stages
    from anycontrast.training.config import load_config

    config = load_config(tiny_yaml)
    for stage in (stages.scan, stages.shard, stages.pretrain, stages.finetune):
        stage(config)
    stages.finetune(load_config(tiny_yaml, ["finetune.from_scratch=true"]))
    stages.evaluate(config)
    stages.export(config)
    return config


@pytest.fixture
def run_copy(
    tiny_run: object, tiny_yaml: Path, tmp_path: Path, write_tiny_yaml: Callable[[Path], Path]
) -> Path:
    """A copy of the whole tiny run to damage; returns its config file, in `tmp_path`."""
    import shutil

    shutil.copytree(tiny_yaml.parent / "runs", tmp_path / "runs")
    return write_tiny_yaml(tmp_path)
