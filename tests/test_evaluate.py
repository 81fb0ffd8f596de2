"""Evaluation on every contrast subset: which studies count, right numbers, all files."""

import csv
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anycontrast.evaluation.evaluate import (
    EvaluateConfig,
    checkpoint_digest,
    find_finetuned,
    labelled_indices,
    load_finetuned,
    run_evaluate,
    score_models,
    write_report,
)
from anycontrast.evaluation.tables import StudyScore, markdown_table, summarise
from anycontrast.models.amae import AMAEConfig
from anycontrast.models.segmenter import (
    Segmenter,
    SegmenterConfig,
    TransferReport,
    build_segmenter,
    segmenter_model_config,
)
from anycontrast.models.unetr import dense_volumes
from anycontrast.training import checkpoint
from anycontrast.training.checkpoint import CheckpointError
from anycontrast.training.config import Config, load_config
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.store import reader
from anycontrast_datasets.study import ManifestError, StudyArrays

SHAPE = (8, 8, 8)
WINDOW = (8, 8, 8)


@pytest.fixture
def make_study(study_of: Callable[..., StudyArrays]) -> Callable[..., StudyArrays]:
    """A lesion of 4 x 4 x 4 voxels that T1w shows wholly and every other contrast by half."""

    def make(
        study_id: str, contrasts: Sequence[str], *, split: str = "test", has_label: bool = True
    ) -> StudyArrays:
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[2:6, 2:6, 2:6] = 1
        codes = {}
        for contrast in contrasts:
            array = np.full(SHAPE, 1000, dtype=np.int16)
            array[2 : 6 if contrast == "T1w" else 4, 2:6, 2:6] = 3000
            codes[contrast] = array
        kept = label if has_label else None
        return study_of(codes, study_id, subject_id=study_id, split=split, label=kept)

    return make


class MemoryStore:
    def __init__(self, *studies: StudyArrays) -> None:
        self.studies = studies
        self.records = tuple(study.record for study in studies)
        self.fingerprint = "memory"

    def read(
        self, index: int, *, contrasts: Sequence[str] | None = None, label: bool = False
    ) -> StudyArrays:
        study = self.studies[index]
        assert contrasts is None
        return study if label else replace(study, label=None)

    def verify(self) -> list[str]:
        return []


@pytest.fixture
def two_studies(make_study: Callable[..., StudyArrays]) -> Callable[[], Any]:
    def make() -> Any:
        return MemoryStore(
            make_study("a", ("T1w", "FLAIR")),
            make_study("b", ("FLAIR",)),
            make_study("unlabelled", ("T1w",), has_label=False),
            make_study("train", ("T1w", "DWI"), split="train"),
        )

    return make


class Bright(Segmenter):
    """Segments what is bright in any contrast; `sign` -1 segments everything else."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__(SegmenterConfig(window_vox=WINDOW, regions={"lesion": [1]}), (4, 4, 4))
        self.sign = sign

    def forward(self, batch: PackedBatch) -> Tensor:
        assert batch.num_studies == 1
        return 10 * self.sign * dense_volumes(batch).amax(dim=0)[None, None]

    def load_pretrained(self, tensors: object) -> TransferReport:
        raise NotImplementedError


def test_a_study_counts_only_where_it_has_every_contrast_and_dice_is_right(
    two_studies: Callable[[], Any],
) -> None:
    scores = score_models({"pretrained": Bright()}, two_studies(), EvaluateConfig())
    found = {(s.study_id, s.subset): s.dice for s in scores}
    # FLAIR shows half of the lesion: 2 * 32 / (32 + 64). With T1w all of it is seen.
    assert found == {
        ("a", ("T1w",)): 1.0,
        ("a", ("FLAIR",)): pytest.approx(2 / 3),
        ("a", ("T1w", "FLAIR")): 1.0,
        ("b", ("FLAIR",)): pytest.approx(2 / 3),
    }


class BrightT1w(Bright):
    """Has a channel for T1w only, as a stock UNETR may."""

    def accepts(self, contrasts: Collection[str]) -> bool:
        return set(contrasts) <= {"T1w"}


def test_a_model_of_fixed_channels_is_measured_on_what_it_sees(
    caplog: pytest.LogCaptureFixture,
    two_studies: Callable[[], Any],
) -> None:
    scores = score_models({"pretrained": BrightT1w()}, two_studies(), EvaluateConfig())
    assert {s.subset for s in scores} == {("T1w",)}
    assert "2 subsets, which are left out: FLAIR, T1w+FLAIR" in caplog.text
    with pytest.raises(ManifestError, match="no channel for any of FLAIR"):
        blind = EvaluateConfig(contrasts=["FLAIR"])
        score_models({"pretrained": BrightT1w()}, two_studies(), blind)


def test_contrasts_and_study_limits_bound_the_work(two_studies: Callable[[], Any]) -> None:
    config = EvaluateConfig(contrasts=["FLAIR"], max_studies=1)
    scores = score_models({"pretrained": Bright()}, two_studies(), config)
    assert [(s.study_id, s.subset) for s in scores] == [("a", ("FLAIR",))]


def test_a_split_without_labelled_studies_is_an_error_that_says_so(
    two_studies: Callable[[], Any],
) -> None:
    with pytest.raises(ManifestError, match="no labelled study in split 'val'"):
        labelled_indices(two_studies(), "val")
    with pytest.raises(ManifestError, match="DWI"):
        labelled_indices(two_studies(), "test", ["DWI"])


def test_the_report_has_all_files_with_the_right_numbers(
    tmp_path: Path, two_studies: Callable[[], Any]
) -> None:
    config = EvaluateConfig(num_bootstrap=50)
    models = {"pretrained": Bright(), "scratch": Bright(-1.0)}
    scores = score_models(models, two_studies(), config)
    measured = tmp_path / "step-00000002"
    measured.mkdir()
    (measured / "manifest.json").write_text("{}")
    summary = write_report(scores, tmp_path, config, {"pretrained": measured})
    with (tmp_path / "dice_by_subset.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Three subsets, one region, two variants.
    assert len(rows) == 6
    table = {(r["variant"], r["subset"]): r for r in rows}
    assert float(table["pretrained", "FLAIR"]["dice_mean"]) == pytest.approx(2 / 3, abs=1e-6)
    assert table["pretrained", "FLAIR"]["num_studies"] == "2"
    assert table["pretrained", "T1w+FLAIR"]["num_studies"] == "1"
    assert float(table["pretrained", "T1w"]["gain_mean"]) == 1.0
    # The opposite of T1w's picture misses the lesion wholly.
    assert float(table["scratch", "T1w"]["dice_mean"]) == 0.0
    assert table["scratch", "T1w"]["gain_mean"] == ""
    text = (tmp_path / "dice_by_subset.md").read_text()
    assert "| T1w | lesion | 1 | 1.000 (1.000 to 1.000) | 0.000 (0.000 to 0.000) | +1.000" in text
    assert "empty ground truth" in text
    assert (tmp_path / "dice_by_subset.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "dice_by_subset.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    assert summary["checkpoints"] == {"pretrained": "step-00000002"}
    assert summary["digests"] == {"pretrained": checkpoint_digest(measured)}
    assert len((tmp_path / "dice_by_study.csv").read_text().splitlines()) == 1 + 8


def test_the_gain_is_paired_by_study() -> None:
    def score(variant: str, study: str, value: float) -> StudyScore:
        return StudyScore(variant, study, ("T1w",), "lesion", value)

    scores = [score("pretrained", s, d) for s, d in (("a", 0.9), ("b", 0.5), ("c", 0.4))]
    scores += [score("scratch", s, d) for s, d in (("b", 0.4), ("a", 0.8))]
    rows = summarise(scores, num_bootstrap=200, seed=0)
    gain = rows[0].gain
    assert gain is not None
    # Each study gains 0.1, so there is no spread although the scores themselves vary.
    assert gain.mean == pytest.approx(0.1)
    assert gain.high - gain.low < 1e-9
    assert gain.num_studies == 2
    assert rows[0].score.mean == pytest.approx(0.6)
    assert rows[1].gain is None


def test_a_study_with_empty_truth_can_be_left_out(make_study: Callable[..., StudyArrays]) -> None:
    study = make_study("a", ("T1w",))
    assert study.label is not None
    study.label[:] = 0
    store: Any = MemoryStore(study)
    scores = score_models({"pretrained": Bright()}, store, EvaluateConfig(empty_truth="nan"))
    rows = summarise(scores, num_bootstrap=10, seed=0)
    assert rows[0].score.num_studies == 0
    assert "n/a" in markdown_table(rows, note="")


def fake_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, kind: str = "segmenter"
) -> Segmenter:
    torch.manual_seed(0)
    model = AMAEConfig(preset="tiny", width=64, depth=1, num_heads=1, patch_vox=(4, 4, 4))
    config = SegmenterConfig(window_vox=WINDOW, feature_size=2)
    segmenter = build_segmenter(config, model)
    state = {"kind": kind, "model_config": segmenter_model_config(config, model)}
    monkeypatch.setattr(checkpoint, "load_weights", lambda path: (segmenter.state_dict(), state))
    best = folder / "pretrained" / "checkpoints" / "step-00000004"
    best.mkdir(parents=True)
    (best / "manifest.json").write_text("{}")
    (folder / "pretrained" / "best.json").write_text('{"checkpoint": "step-00000004"}')
    return segmenter


def test_a_run_is_evaluated_from_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_studies: Callable[[], Any]
) -> None:
    config = Config(name="run", root=str(tmp_path), evaluate=EvaluateConfig(num_bootstrap=10))
    segmenter = fake_checkpoints(config.paths.finetune, monkeypatch)
    monkeypatch.setattr(reader, "open_store", lambda path, cache: two_studies())
    best = config.paths.finetune / "pretrained" / "checkpoints" / "step-00000004"
    assert find_finetuned(config.paths.finetune) == {"pretrained": best}
    loaded = load_finetuned(best)
    for name, value in segmenter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    summary = run_evaluate(config)
    assert summary["num_studies"] == 2
    assert {row["subset"] for row in summary["rows"]} == {"T1w", "FLAIR", "T1w+FLAIR"}
    names = {path.name for path in config.paths.report.iterdir()}
    assert names >= {f"dice_by_subset.{kind}" for kind in ("csv", "md", "png", "json")}


def test_a_best_checkpoint_that_is_gone_gives_way_to_the_newest_whole_one(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = load_config(run_copy).paths
    for variant in ("pretrained", "scratch"):
        best = paths.finetune / variant / "best.json"
        best.write_text(json.dumps({**json.loads(best.read_text()), "checkpoint": "step-00000099"}))
    shutil.rmtree(paths.finetune / "scratch" / "checkpoints")
    found = find_finetuned(paths.finetune)
    newest = paths.finetune / "pretrained" / "checkpoints" / "step-00000004"
    assert found == {"pretrained": newest}
    assert caplog.text.count("names step-00000099, which is gone") == 2


def test_nothing_finetuned_and_other_models_are_checkpoint_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no finetuned segmenter"):
        run_evaluate(Config(name="run", root=str(tmp_path)))
    fake_checkpoints(tmp_path, monkeypatch, kind="amae")
    with pytest.raises(CheckpointError, match="'amae'"):
        load_finetuned(tmp_path)
