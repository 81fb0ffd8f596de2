"""Real MRI goes the whole way: scan, shard, pretrain, finetune, export, predict, by the CLI."""

import csv
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from nibabel.nifti1 import Nifti1Image

from anycontrast.cli import main
from anycontrast_datasets.manifest import read_locations, read_manifest
from anycontrast_datasets.resample import Grid, resample
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.study import StudyArrays
from anycontrast_datasets.volume import read_volume

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / "shared" / "real_mri"
CONFIG = REPOSITORY / "recipes" / "configs" / "real_mri.yaml"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the shared real MRI is not here")

MULTIPLE_SCLEROSIS = "openms_cross/patient19"
STROKE = "isles22/sub-strokecase0009"
CLINICAL = "openms_long/patient12"
FILE_OF = {
    MULTIPLE_SCLEROSIS: {
        "T1w": "T1.nii.gz",
        "T1wCE": "T1POST.nii.gz",
        "T2w": "T2.nii.gz",
        "FLAIR": "FLAIR.nii.gz",
    },
    CLINICAL: {
        "T1w": "study1_T1W.nii.gz",
        "T2w": "study1_T2W.nii.gz",
        "FLAIR": "study1_FLAIR.nii.gz",
    },
    STROKE: {
        "FLAIR": "sub-strokecase0009_ses-0001_flair.nii.gz",
        "DWI": "sub-strokecase0009_ses-0001_dwi.nii.gz",
        "ADC": "sub-strokecase0009_ses-0001_adc.nii.gz",
    },
}
# Original ids as they stand in paths and in the table. None is so short that a file of random
# bytes holds it by chance; the run's own name is not one of them.
ORIGINAL_IDS = (
    *("patient19", "patient12", "patient01", "patient20", "openms", "isles22", "isles-0009"),
    *("strokecase", "cstar_stroke", "cstar-1", "xa30-volunteer", "torchio", "romeo_gre"),
    *("study1_", "study2_", "lesion_mask", "canon-volunteer"),
)
COARSE = (
    "prepare.spacing_mm=[4.0,4.0,4.0]",
    "pretrain.steps=12",
    "pretrain.log_every=1",
    "pretrain.checkpoint_every=12",
    "pretrain.panel_every=-1",
    "pretrain.optim.warmup_steps=2",
    "finetune.steps=6",
    "finetune.log_every=1",
    "finetune.checkpoint_every=6",
    "finetune.optim.warmup_steps=1",
    "finetune.segmenter.window_vox=[32,32,32]",
    "finetune.segmenter.feature_size=4",
)
SLOW = (
    "prepare.spacing_mm=[3.0,3.0,3.0]",
    "pretrain.steps=20",
    "pretrain.panel_every=-1",
    "finetune.segmenter.window_vox=[32,32,32]",
)
SLOW_DICE = 0.4
"""Of the training case itself; measured 0.59."""
PREDICT = "predict.overlap=0.0"


def run_stages(folder: Path, *words: str) -> Path:
    """Every stage by the command line, on a fixed pseudonym key; returns the run folder."""
    key = folder / "secret.key"
    key.write_text("0123456789abcdef" * 4 + "\n")
    table = REPOSITORY / "docs" / "real_data_table.csv"
    common = [
        *(str(CONFIG), f"root={folder}", f"scan.root={REAL}", f"scan.table={table}"),
        *(f"scan.pseudonym_key_file={key}", "cluster.mode=process"),
    ]
    for stage in ("scan", "shard", "validate", "pretrain", "finetune", "export"):
        assert main([stage, *common, *words]) == 0, stage
    return folder / "real_mri"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stages(tmp_path_factory.mktemp("real"), *COARSE)


def load(path: Path) -> Nifti1Image:
    image = nib.load(path)
    assert isinstance(image, Nifti1Image)
    return image


def axes(image: Nifti1Image) -> tuple[str | None, ...]:
    codes: tuple[str | None, ...] = nib.aff2axcodes(image.affine)  # type: ignore[no-untyped-call]
    return codes


def study_id_of(run: Path, folder: str) -> str:
    under = (REAL / folder).resolve()
    (found,) = {
        study_id
        for (study_id, _), path in read_locations(run / "manifest").items()
        if under in path.parents
    }
    return found


def stored(run: Path, folder: str, *, label: bool = False) -> StudyArrays:
    store = open_store(run / "shards")
    study_id = study_id_of(run, folder)
    (index,) = (i for i, r in enumerate(store.records) if r.study_id == study_id)
    return store.read(index, label=label)


def z_scores(arrays: StudyArrays, contrast: str) -> npt.NDArray[np.float32]:
    codes = arrays.codes[contrast].astype(np.float32)
    inside = codes != 0
    return np.where(inside, (codes - codes[inside].mean()) / codes[inside].std(), 0.0)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_all_sixty_files_are_accounted_for(run: Path) -> None:
    summary = json.loads((run / "manifest" / "summary.json").read_text())
    assert summary["inputs"] == summary["accepted"] + summary["refused"] == 60
    assert (summary["accepted"], summary["studies"], summary["labels"]) == (24, 7, 2)
    assert summary["by_split"] == {"train": 7}
    with (run / "manifest" / "private" / "ledger.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == summary["refused"]


def test_every_accepted_study_is_sharded_with_every_contrast(run: Path) -> None:
    scanned = {s.study_id: s.contrasts for s in read_manifest(run / "manifest/manifest.parquet")}
    sharded = {r.study_id: r.contrasts for r in open_store(run / "shards").records}
    assert sharded == scanned
    assert json.loads((run / "shards" / "dataset.json").read_text()).get("refused", []) == []


def test_pretraining_on_real_studies_lowers_the_loss(run: Path) -> None:
    found = losses(run / "pretrain")
    assert len(found) == 12
    assert np.mean(found[-3:]) < 0.95 * np.mean(found[:3])


def test_finetuning_on_the_labelled_cases_lowers_the_loss(run: Path) -> None:
    found = losses(run / "finetune" / "pretrained")
    assert len(found) == 6
    assert np.mean(found[-2:]) < np.mean(found[:2])


def test_reconstructions_of_real_contrasts_are_told_apart(run: Path) -> None:
    names = (run / "pretrain" / "metrics.jsonl").read_text()
    for contrast in ("T1w", "T1wCE", "T2w", "FLAIR", "DWI", "ADC", "FA", "b0", "CBF", "GRE"):
        assert f'"loss/contrast/{contrast}"' in names
    assert '"loss/set/DWI+GRE+FA+b0+CBF"' in names or '"loss/set/DWI+ADC+FLAIR"' in names


def test_no_original_id_is_in_what_may_be_handed_on(run: Path) -> None:
    handed_on = [
        *(run / "shards").rglob("*"),
        *(run / "manifest").glob("*.*"),
        *(run / "pretrain" / "checkpoints").rglob("*"),
        *(run / "finetune").rglob("*"),
        *(run / "release").rglob("*"),
    ]
    files = [path for path in handed_on if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes().lower().replace(b"real_mri", b"")
        for word in ORIGINAL_IDS:
            assert word.encode() not in content, (path.name, word)
            assert word not in path.name, path.name


@pytest.mark.parametrize(("folder", "contrast"), [(MULTIPLE_SCLEROSIS, "FLAIR"), (STROKE, "DWI")])
def test_labels_land_on_bright_lesions(run: Path, folder: str, contrast: str) -> None:
    arrays = stored(run, folder, label=True)
    assert arrays.label is not None
    assert z_scores(arrays, contrast)[arrays.label > 0].mean() > 1.0


@pytest.mark.parametrize(
    ("folder", "mask"),
    [
        (MULTIPLE_SCLEROSIS, "lesion_mask.nii.gz"),
        (STROKE, "sub-strokecase0009_ses-0001_msk.nii.gz"),
    ],
)
def test_stored_labels_go_back_to_where_the_expert_drew_them(
    run: Path, folder: str, mask: str
) -> None:
    arrays = stored(run, folder, label=True)
    assert arrays.label is not None
    drawn = read_volume(REAL / folder / mask)
    nx, ny, nz = drawn.array.shape
    back = resample(
        (arrays.label > 0).astype(np.float32),
        Grid(shape=arrays.record.shape, affine=np.asarray(arrays.record.affine)),
        Grid(shape=(nx, ny, nz), affine=drawn.affine),
    )
    centre, drawn_centre = (
        np.asarray(np.nonzero(a > 0.5)).mean(axis=1) for a in (back, drawn.array)
    )
    assert np.abs(centre - drawn_centre).max() * max(drawn.spacing_mm) < 2.0
    assert dice(back > 0.5, drawn.array > 0.5) > 0.4


@pytest.mark.parametrize("folder", [MULTIPLE_SCLEROSIS, STROKE, CLINICAL])
def test_contrasts_of_one_person_line_up_on_the_study_grid(run: Path, folder: str) -> None:
    arrays = stored(run, folder)
    reference = arrays.record.reference
    for contrast in set(arrays.codes) - {reference}:
        fixed, moving = z_scores(arrays, reference), z_scores(arrays, contrast)
        shifts = [s for s in itertools.product((-2, 0, 2), repeat=3) if np.abs(s).sum() <= 2]
        best = max(shifts, key=lambda s: information(fixed, np.roll(moving, s, axis=(0, 1, 2))))
        assert best == (0, 0, 0), contrast


@pytest.mark.parametrize("folder", [STROKE, CLINICAL])
def test_volumes_lie_where_nibabel_puts_them(run: Path, folder: str) -> None:
    from nibabel.processing import resample_from_to

    arrays = stored(run, folder)
    grid = (arrays.record.shape, np.asarray(arrays.record.affine))
    for contrast, name in FILE_OF[folder].items():
        ours = arrays.codes[contrast]
        image = load(REAL / folder / name)
        moved = resample_from_to(image, grid, order=1)  # type: ignore[no-untyped-call]
        theirs = moved.get_fdata()
        inside = ours != 0
        shifts = [s for s in itertools.product((-1, 0, 1), repeat=3) if np.abs(s).sum() <= 1]
        alike = {
            s: np.corrcoef(np.roll(theirs, s, axis=(0, 1, 2))[inside], ours[inside])[0, 1]
            for s in shifts
        }
        # Not 1: fine voxels are averaged before they are thinned out, nibabel only picks.
        assert max(alike, key=alike.__getitem__) == (0, 0, 0), contrast
        assert alike[0, 0, 0] > 0.85, contrast


def information(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Mutual information of two volumes, nats."""
    joint = np.histogram2d(a.ravel(), b.ravel(), bins=24)[0]
    p = joint / joint.sum()
    apart = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / apart[p > 0])).sum())


@pytest.mark.parametrize(
    ("folder", "like"),
    [
        (MULTIPLE_SCLEROSIS, None),
        (CLINICAL, None),
        (CLINICAL, "T2w"),
        (CLINICAL, "FLAIR"),
        (STROKE, "DWI"),
    ],
)
def test_predictions_lie_on_the_grid_of_the_input_file(
    run: Path, tmp_path: Path, folder: str, like: str | None
) -> None:
    words = [] if like is None else [f"predict.like={like}"]
    release = str(run / "release" / "segmenter")
    assert main(["predict", release, str(REAL / folder), str(tmp_path), PREDICT, *words]) == 0
    report = json.loads((tmp_path / "prediction.json").read_text())
    assert set(report["contrasts_used"]) == set(FILE_OF[folder])
    name = FILE_OF[folder][like or report["geometry_of"]]
    source, predicted = load(REAL / folder / name), load(tmp_path / "lesion.nii.gz")
    assert predicted.shape == source.shape
    np.testing.assert_allclose(predicted.affine, source.affine, rtol=0, atol=1e-5)
    assert axes(predicted) == axes(source)
    assert set(np.unique(np.asanyarray(predicted.dataobj))) <= {0, 1}


def test_the_files_predicted_on_differ_in_grid_and_orientation() -> None:
    images = [load(REAL / CLINICAL / name) for name in FILE_OF[CLINICAL].values()]
    assert len({image.shape for image in images}) == 3
    assert {axes(image) for image in images} == {("L", "P", "S")}
    others = [load(REAL / MULTIPLE_SCLEROSIS / "T1.nii.gz")]
    others += [load(REAL / STROKE / FILE_OF[STROKE]["DWI"])]
    assert {axes(image) for image in others} == {("L", "A", "S")}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_finetuning_finds_the_lesions_it_was_shown(tmp_path: Path) -> None:
    run = run_stages(tmp_path, *SLOW)
    out = tmp_path / "prediction"
    study = str(REAL / MULTIPLE_SCLEROSIS)
    words = ["predict.like=FLAIR", "predict.overlap=0.25"]
    assert main(["predict", str(run / "release" / "segmenter"), study, str(out), *words]) == 0
    predicted = np.asanyarray(load(out / "lesion.nii.gz").dataobj) > 0
    drawn = np.asanyarray(load(Path(study) / "lesion_mask.nii.gz").dataobj) > 0
    found = dice(predicted, drawn)
    assert found > SLOW_DICE, found


def dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))
