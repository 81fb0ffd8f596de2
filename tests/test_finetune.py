"""Finetuning: data, loss, validation, transfer, and the whole run through the training loop."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.segmenter import SegmenterConfig
from anycontrast.training import checkpoint
from anycontrast.training.checkpoint import CheckpointError
from anycontrast.training.config import Config
from anycontrast.training.finetune import FinetuneConfig, make_task, run_finetune
from anycontrast.training.optim import OptimConfig, build_adamw
from anycontrast.training.segmentation import FinetuneTask, LabelledStore
from anycontrast_datasets.store import reader
from anycontrast_datasets.store.partial import Vox3, crop_arrays
from anycontrast_datasets.stream import StudyStream
from anycontrast_datasets.study import ManifestError, StudyArrays

SHAPE = (16, 16, 12)
WINDOW = (16, 16, 8)
PATCH = (8, 8, 4)


@pytest.fixture
def make_study(study_of: Callable[..., StudyArrays]) -> Callable[..., StudyArrays]:
    """Noise with a bright block, the lesion, somewhere inside."""

    def make(
        study_id: str,
        contrasts: Sequence[str] = ("T1w", "FLAIR"),
        *,
        split: str = "train",
        has_label: bool = True,
        seed: int = 0,
    ) -> StudyArrays:
        rng = np.random.default_rng(seed)
        corner = rng.integers(2, 6, size=3)
        lesion = tuple(slice(int(c), int(c) + 6) for c in corner)
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[lesion] = 2
        codes = {}
        for contrast in contrasts:
            array = rng.normal(1500, 200, size=SHAPE)
            array[lesion] += 1500
            codes[contrast] = array.clip(1, 4095).astype(np.int16)
        return study_of(
            codes,
            study_id,
            subject_id=study_id,
            split=split,
            spacing_mm=(1.0, 1.0, 1.5),
            step_mm=(1.0, 1.0, 1.5),
            label=label if has_label else None,
            mean=1700.0,
            std=600.0,
            occupancy="////",
        )

    return make


class MemoryStore:
    def __init__(self, *studies: StudyArrays) -> None:
        self.studies = studies
        self.records = tuple(study.record for study in studies)
        self.fingerprint = "memory"

    def read(
        self,
        index: int,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
        out: object = None,
    ) -> StudyArrays:
        study = self.studies[index]
        codes = {c: study.codes[c] for c in (contrasts or study.codes)}
        return replace(study, codes=codes, label=study.label if label else None)

    def read_crop(self, index: int, start: Vox3, size: Vox3, **options: Any) -> StudyArrays:
        return crop_arrays(self.read(index, **options), start, size)

    def verify(self) -> list[str]:
        return []


@pytest.fixture
def small_store(make_study: Callable[..., StudyArrays]) -> Callable[[], Any]:
    def make() -> Any:
        return MemoryStore(
            make_study("a", ("T1w", "FLAIR", "DWI"), seed=1),
            make_study("unlabelled", has_label=False, seed=2),
            make_study("b", ("FLAIR",), seed=3),
            make_study("v", split="val", seed=4),
            make_study("t", split="test", seed=5),
        )

    return make


def tiny_model() -> AMAEConfig:
    return AMAEConfig(preset="tiny", width=64, depth=2, num_heads=1, patch_vox=PATCH)


def tiny_config(**changes: object) -> FinetuneConfig:
    values: dict[str, object] = {
        "segmenter": SegmenterConfig(
            window_vox=WINDOW, feature_size=4, regions={"lesion": [1, 2], "core": [2]}
        ),
        "steps": 4,
        "optim": OptimConfig(lr=1e-3),
        "studies_per_step": 2,
        "validate_every": 2,
        "overlap": 0.0,
    }
    return FinetuneConfig(**(values | changes))  # type: ignore[arg-type]


def test_only_labelled_studies_are_served_and_the_rest_is_counted(
    caplog: pytest.LogCaptureFixture,
    small_store: Callable[[], Any],
) -> None:
    with caplog.at_level(logging.INFO):
        store = LabelledStore(small_store())
    assert [r.study_id for r in store.records] == ["a", "b", "v", "t"]
    assert "1 left out" in caplog.text
    assert store.read(1, label=True).record.study_id == "b"
    with StudyStream(store, tiny_config().stream_config(), PATCH, seed=0) as stream:
        for _, packs in zip(range(4), stream, strict=False):
            for batch in packs.packs:
                assert set(batch.study_ids) <= {"a", "b"}
                assert all(label is not None for label in batch.labels)
                assert set(batch.patch_grids) == {(2, 2, 2)}


def test_a_split_without_labels_is_an_error(make_study: Callable[..., StudyArrays]) -> None:
    store: Any = MemoryStore(make_study("a", has_label=False))
    with pytest.raises(ManifestError, match="no labelled study in split 'train'"):
        LabelledStore(store)


def test_one_study_is_overfitted(make_study: Callable[..., StudyArrays]) -> None:
    torch.manual_seed(0)
    store: Any = MemoryStore(make_study("a"), make_study("a-again", split="val"))
    config = tiny_config(
        segmenter=SegmenterConfig(window_vox=WINDOW, feature_size=4, regions={"lesion": [2]}),
        studies_per_step=1,
        drop_contrasts=False,
        flip_axes=[],
        foreground_crop_fraction=1.0,
    )
    task = FinetuneTask(config, tiny_model(), LabelledStore(store), pretrained=None)
    optimizer = build_adamw(task.model, OptimConfig(lr=1e-2))
    device = torch.device("cpu")
    before = task.validate(task.model, step=0)
    losses = []
    with StudyStream(store, config.stream_config(), PATCH, seed=0) as stream:
        for step, packs in zip(range(40), stream, strict=False):
            micro = task.prepare(packs.packs[0], step=step, device=device)
            loss, parts = task.loss(task.model, micro)
            optimizer.zero_grad()
            torch.autograd.backward([loss / micro.count])
            optimizer.step()
            losses.append(float(loss.detach()))
    after = task.validate(task.model, step=40)
    assert before is not None
    assert after is not None
    assert losses[-1] < 0.7 * losses[0]
    assert after.metrics["val/dice"] > 0.8 > before.metrics["val/dice"]
    assert after.is_best
    assert set(parts) == {"dice/lesion"}


def test_the_loss_is_a_sum_over_studies(small_store: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    store = LabelledStore(small_store())
    config = tiny_config(drop_contrasts=False, foreground_crop_fraction=0.0)
    task = FinetuneTask(config, tiny_model(), store, pretrained=None)
    device = torch.device("cpu")
    with StudyStream(store, config.stream_config(), PATCH, seed=0) as stream:
        both = next(stream).packs[0]
    split = replace(config, packs_per_step=2).stream_config()
    with StudyStream(store, split, PATCH, seed=0) as stream:
        single = next(stream).packs
    micro = task.prepare(both, step=0, device=device)
    assert micro.count == 2
    total = float(task.loss(task.model, micro)[0].detach())
    apart = [
        float(task.loss(task.model, task.prepare(p, step=0, device=device))[0].detach())
        for p in single
    ]
    assert len(apart) == 2
    assert total == pytest.approx(sum(apart), rel=1e-5)


def test_without_validation_studies_the_newest_counts_as_best_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
    make_study: Callable[..., StudyArrays],
) -> None:
    plain: Any = MemoryStore(make_study("a"))
    store = LabelledStore(plain)
    task = FinetuneTask(tiny_config(), tiny_model(), store, pretrained=None)
    assert "no validation" in caplog.text
    found = task.validate(task.model, step=1)
    assert found is not None
    assert found.is_best
    assert not found.metrics


def test_a_worse_validation_is_not_the_best(small_store: Callable[[], Any]) -> None:
    store = LabelledStore(small_store())
    task = FinetuneTask(tiny_config(), tiny_model(), store, pretrained=None, best_dice=1.0)
    found = task.validate(task.model, step=1)
    assert found is not None
    assert not found.is_best
    assert set(found.metrics) == {"val/dice", "val/dice/lesion", "val/dice/core"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("overlap", 1.0), ("max_validation_studies", -2), ("foreground_crop_fraction", 1.5)],
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        tiny_config(**{field: value})


def test_a_head_of_fixed_channels_is_shown_what_it_has_channels_for() -> None:
    head = SegmenterConfig(head="unetr", contrasts=["T1w", "FLAIR"], window_vox=WINDOW)
    assert tiny_config(segmenter=head).stream_config().contrasts == ["T1w", "FLAIR"]
    chosen = tiny_config(segmenter=head, contrasts=["FLAIR"])
    assert chosen.stream_config().contrasts == ["FLAIR"]
    with pytest.raises(ValueError, match=r"finetune.contrasts must be among .*DWI"):
        tiny_config(segmenter=head, contrasts=["FLAIR", "DWI"])


def give_pretrained(
    monkeypatch: pytest.MonkeyPatch, *, seed: int = 1, drop: str = "", kind: str = "amae"
) -> AMAE:
    torch.manual_seed(seed)
    model = AMAE(tiny_model())
    tensors = {n: v for n, v in model.state_dict().items() if n != drop}
    # As JSON brings it back: tuples have become lists.
    from dataclasses import asdict

    values = json.loads(json.dumps(asdict(tiny_model().resolved())))
    state = {"kind": kind, "step": 7, "model_config": values}
    monkeypatch.setattr(checkpoint, "load_weights", lambda path: (tensors, state))
    return model


def test_pretrained_and_scratch_differ_in_the_encoder_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_store: Callable[[], Any]
) -> None:
    pretrained = give_pretrained(monkeypatch)
    store = LabelledStore(small_store())
    config = Config(root=str(tmp_path), model=tiny_model(), finetune=tiny_config())
    torch.manual_seed(0)
    first, origin = make_task(config, store)
    assert origin["step"] == 7
    torch.manual_seed(0)
    scratch = replace(config, finetune=tiny_config(from_scratch=True))
    second, _ = make_task(scratch, store)
    assert (config.finetune.variant, scratch.finetune.variant) == ("pretrained", "scratch")
    mine, theirs = first.model.state_dict(), second.model.state_dict()
    for name, value in pretrained.encoder.state_dict().items():
        assert torch.equal(mine[f"encoder.{name}"], value)
    differing = {n for n in mine if not torch.equal(mine[n], theirs[n])}
    assert differing
    assert all(n.startswith("encoder.") for n in differing)


def test_pretrained_weights_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_store: Callable[[], Any]
) -> None:
    store = LabelledStore(small_store())
    config = Config(root=str(tmp_path), finetune=tiny_config())
    give_pretrained(monkeypatch, drop="encoder.norm.bias")
    with pytest.raises(CheckpointError, match=r"encoder\.norm\.bias"):
        make_task(config, store)
    give_pretrained(monkeypatch, kind="segmenter")
    with pytest.raises(CheckpointError, match="expected a pretrained amae"):
        make_task(config, store)


def test_a_missing_pretraining_checkpoint_is_said(
    tmp_path: Path, small_store: Callable[[], Any]
) -> None:
    with pytest.raises(CheckpointError):
        make_task(Config(root=str(tmp_path), finetune=tiny_config()), LabelledStore(small_store()))


def test_a_whole_run_leaves_a_best_checkpoint_that_can_be_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_store: Callable[[], Any]
) -> None:
    from anycontrast.evaluation.evaluate import find_finetuned, load_finetuned

    load_weights = checkpoint.load_weights
    monkeypatch.setattr(reader, "open_store", lambda path, cache: small_store())
    config = Config(name="run", root=str(tmp_path), model=tiny_model(), finetune=tiny_config())
    give_pretrained(monkeypatch)
    result = run_finetune(config)
    assert (result["variant"], result["step"]) == ("pretrained", 4)
    folder = config.paths.finetune / "pretrained"
    best = json.loads((folder / "best.json").read_text())
    assert 0 <= best["metrics"]["val/dice"] <= 1
    assert run_finetune(config)["step"] == 4
    # Other pretrained weights must not be mixed into the finished run.
    give_pretrained(monkeypatch, seed=2)
    with pytest.raises(CheckpointError, match="was started from the pretrained weights"):
        run_finetune(config)
    monkeypatch.setattr(checkpoint, "load_weights", load_weights)
    found = find_finetuned(config.paths.finetune)
    assert found == {"pretrained": folder / "checkpoints" / best["checkpoint"]}
    loaded = load_finetuned(found["pretrained"])
    assert loaded.regions == tiny_config().segmenter.region_values
