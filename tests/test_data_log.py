"""The books of a run: audited epochs, named damage, and what a resumed run does with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anycontrast.models.amae import AMAEConfig
from anycontrast.training import pretrain
from anycontrast.training.checkpoint import CheckpointError, load_weights
from anycontrast.training.config import Config
from anycontrast.training.loop import TrainingInterrupted
from anycontrast.training.metrics import read_metrics
from anycontrast.training.optim import OptimConfig
from anycontrast.training.pretrain import PretrainConfig, pretrain_worker
from anycontrast_datasets.mixing import MixingConfig
from anycontrast_datasets.stream import StreamConfig
from anycontrast_datasets.study import ShardError

MODEL = AMAEConfig(preset="tiny", patch_vox=(4, 4, 4), width=64, depth=1, num_heads=1)
DAMAGED = {"s001": "T1w", "s006": "T1w"}


def make_config(root: Path, **stream: Any) -> Config:
    values = {"studies_per_step": 4, "packs_per_step": 4, "num_threads": 1, **stream}
    options = PretrainConfig(
        stream=StreamConfig(**values),
        steps=4,
        log_every=1,
        checkpoint_every=1,
        panel_every=-1,
        optim=OptimConfig(lr=1e-3),
    )
    return Config(name="test", root=str(root), seed=3, model=MODEL, pretrain=options)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_after(step: int) -> Callable[[], bool]:
    asked = iter(range(1, 100))
    return lambda: next(asked) >= step


@pytest.fixture
def _damaged(memory_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    store = memory_store(8, datasets=("a", "a", "a", "b"), damaged=DAMAGED)
    monkeypatch.setattr(pretrain, "open_shards", lambda config: store)


@pytest.mark.usefixtures("_damaged")
def test_a_damaged_study_is_left_out_logged_and_shown_in_the_result(tmp_path: Path) -> None:
    config = make_config(tmp_path, on_corrupt="skip", max_corrupt_fraction=0.25)
    with pytest.raises(TrainingInterrupted):
        pretrain_worker(config, stop_requested=stop_after(3))
    folder = config.paths.pretrain
    # What a run wrote after its newest checkpoint, and died, is written anew.
    with (folder / "audit.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 4, "epoch": 1}) + "\n")
    assert pretrain_worker(config)["quarantined_studies"] == 2
    found = read_lines(folder / "quarantine.jsonl")
    assert {(line["shard"], line["study_id"], line["member"]) for line in found} == {
        ("memory-0.tar", study_id, member) for study_id, member in DAMAGED.items()
    }
    assert all("xxh3" in line["reason"] and line["step"] in (1, 2) for line in found)
    audits = read_lines(folder / "audit.jsonl")
    assert [(a["epoch"], a["step"], a["served"], a["quarantined"]) for a in audits] == [
        (0, 2, 6, 2),
        (1, 4, 6, 2),
    ]
    assert audits[0]["served_hash"] != audits[1]["served_hash"]
    assert audits[0]["mix"]["dataset/b"] == 0.25
    _, state = load_weights(folder / "checkpoints")
    assert state["stream"]["quarantine"]["num"] == 2
    # Nothing is left to do, and the result still tells.
    assert pretrain_worker(config)["quarantined_studies"] == 2


@pytest.mark.usefixtures("_damaged")
def test_metrics_hold_the_realised_mix_and_the_wait(tmp_path: Path) -> None:
    config = make_config(tmp_path, on_corrupt="skip", max_corrupt_fraction=0.25)
    pretrain_worker(config)
    for line in read_metrics(config.paths.pretrain / "metrics.jsonl"):
        shares = {name: value for name, value in line.items() if name.startswith("mix/")}
        assert shares["mix/dataset/a"] + shares.get("mix/dataset/b", 0.0) == pytest.approx(1.0)
        sets = [value for name, value in shares.items() if name.startswith("mix/set/")]
        assert sum(sets) == pytest.approx(1.0)
        assert shares["mix/contrast/T1w"] == 1.0
        assert 0 <= line["data_wait_share"] <= 1


@pytest.mark.usefixtures("_damaged")
def test_a_run_that_stopped_at_damage_goes_on_by_skipping(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"memory-0\.tar, study s00[16], member T1w"):
        pretrain_worker(make_config(tmp_path))
    config = make_config(tmp_path, on_corrupt="skip", max_corrupt_fraction=0.25)
    assert pretrain_worker(config)["quarantined_studies"] == 2


@pytest.mark.usefixtures("_damaged")
def test_the_cap_names_how_many_and_where(tmp_path: Path) -> None:
    config = make_config(tmp_path, on_corrupt="skip", max_corrupt_fraction=0.2)
    with pytest.raises(ShardError, match=r"2 of 8 studies.*max_corrupt_fraction=0.2.*study s00"):
        pretrain_worker(config)
    assert len(read_lines(config.paths.pretrain / "quarantine.jsonl")) == 2


def test_weights_change_at_an_epoch_edge_and_nowhere_else(
    tmp_path: Path, memory_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory_store(8, datasets=("a", "b"))
    monkeypatch.setattr(pretrain, "open_shards", lambda config: store)
    more_b = MixingConfig(by_dataset={"b": 3.0})
    for stop, folder in ((2, tmp_path / "edge"), (3, tmp_path / "inside")):
        with pytest.raises(TrainingInterrupted):
            pretrain_worker(make_config(folder), stop_requested=stop_after(stop))
    config = make_config(tmp_path / "edge", mixing=more_b)
    pretrain_worker(config)
    mixes = [line["mix"] for line in read_lines(config.paths.pretrain / "audit.jsonl")]
    assert [mix["dataset/b"] for mix in mixes] == [0.5, 0.75]
    with pytest.raises(CheckpointError, match="weights may change at an epoch edge only"):
        pretrain_worker(make_config(tmp_path / "inside", mixing=more_b))
