"""Prediction: the masks lie where the input lies, whatever its axes, spacing and tilt."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast.cli import main
from anycontrast.release.errors import ReleaseError
from anycontrast.release.predict import PredictConfig, on_input_grid, run_predict
from anycontrast.training.config import Config, ConfigError
from anycontrast_datasets.study import ManifestError, StudyError, StudyRecord
from anycontrast_datasets.volume import LoadedVolume, read_volume, write_volume

Triple = tuple[int, int, int]
REGIONS = ("core", "lesion")
OBLIQUE = (0.3, -0.2, 0.15)


def rotation(x: float, y: float, z: float) -> npt.NDArray[np.float64]:
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


def turned(volume: LoadedVolume, axes: Triple, flips: tuple[int, ...]) -> LoadedVolume:
    """The same picture stored along other axes, and tilted in the scanner."""
    tilt = np.eye(4)
    tilt[:3, :3] = rotation(*OBLIQUE)
    affine = tilt @ volume.affine
    array = np.transpose(volume.array, axes)
    affine = affine[:, [*axes, 3]]
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
        affine[:3, axis] *= -1
        array = np.flip(array, axis)
    return LoadedVolume(**{**vars(volume), "array": np.ascontiguousarray(array), "affine": affine})


@pytest.fixture(scope="module")
def segmenter(tiny_run: Config) -> Path:
    return tiny_run.paths.release / "segmenter"


@pytest.fixture
def study(tiny_run: Config, tmp_path: Path) -> Path:
    """DWI stored as A-L-I and tilted, ADC along other axes and with fewer slices."""
    source = tiny_run.paths.source / "sub-0001" / "ses-1" / "dwi"
    folder = tmp_path / "study"
    folder.mkdir()
    dwi = read_volume(next(source.glob("*trace.nii.gz")))
    dwi = turned(dwi, (1, 0, 2), (1, 2))
    write_volume(folder / "DWI.nii.gz", dwi.array, dwi.affine)
    adc = turned(read_volume(next(source.glob("*ADC.nii.gz"))), (2, 0, 1), (0,))
    fewer = adc.affine.copy()
    fewer[:3, 3] += fewer[:3, 2] * 2
    write_volume(folder / "ADC.nii", np.ascontiguousarray(adc.array[:, :, 2:]), fewer)
    return folder


@pytest.mark.parametrize("like", ["DWI", "ADC"])
def test_masks_have_the_shape_and_affine_of_the_input(
    segmenter: Path, study: Path, tmp_path: Path, like: str
) -> None:
    config = PredictConfig(like=like, save_probabilities=True, overlap=0.0)
    report = run_predict(segmenter, study, tmp_path / "out", config)
    source = read_volume(next(study.glob(f"{like}.nii*")))
    for region in REGIONS:
        mask = read_volume(tmp_path / "out" / f"{region}.nii.gz", allow_constant=True)
        probability = read_volume(
            tmp_path / "out" / f"{region}_probability.nii.gz", allow_constant=True
        )
        for written in (mask, probability):
            assert tuple(written.source_shape) == tuple(source.source_shape)
            np.testing.assert_allclose(written.source_affine, source.source_affine, atol=1e-4)
        assert np.array_equal(mask.array, (probability.array > 0.5).astype(np.float32))
        assert 0.0 <= probability.array.min() < probability.array.max() < 1.0
        assert report["voxels"][region] == int(mask.array.sum())
    assert report["geometry_of"] == like
    assert sorted(report["contrasts_used"]) == ["ADC", "DWI"]
    saved = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert saved == {key: value for key, value in report.items() if key != "out"}


def test_the_same_study_stored_along_other_axes_gives_the_same_voxels(
    segmenter: Path, tiny_run: Config, tmp_path: Path
) -> None:
    source = tiny_run.paths.source / "sub-0001" / "ses-1" / "dwi"
    config = PredictConfig(save_probabilities=True, like="DWI", overlap=0.0)
    maps = []
    for name, axes, flips in (("plain", (0, 1, 2), ()), ("stored", (2, 0, 1), (0, 2))):
        folder = tmp_path / name
        folder.mkdir()
        for contrast in ("trace", "ADC"):
            volume = turned(read_volume(next(source.glob(f"*{contrast}.nii.gz"))), axes, flips)
            write_volume(folder / f"{contrast}.nii.gz", volume.array, volume.affine)
        run_predict(segmenter, folder, tmp_path / f"out-{name}", config)
        maps.append(
            read_volume(tmp_path / f"out-{name}" / "lesion_probability.nii.gz", allow_constant=True)
        )
    np.testing.assert_allclose(maps[0].affine, maps[1].affine, atol=1e-3)
    np.testing.assert_allclose(maps[0].array, maps[1].array, atol=1e-4)


def _record(shape: Triple, affine: npt.NDArray[np.float64]) -> StudyRecord:
    rows = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine)
    return StudyRecord(
        study_id="s",
        dataset="d",
        subject_id="s",
        session_id="1",
        split="test",
        shape=shape,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=rows,
        volumes=(),
    )


def _file(tmp_path: Path, shape: Triple, affine: npt.NDArray[np.float64]) -> LoadedVolume:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    write_volume(tmp_path / "like.nii.gz", array, affine)
    return read_volume(tmp_path / "like.nii.gz")


def test_the_region_order_survives_a_config_that_lists_another(
    segmenter: Path, study: Path, tmp_path: Path, tiny_run: Config
) -> None:
    """`core` is part of `lesion` in the labels, so channel order shows in the weights."""
    copy = Path(shutil.copytree(segmenter, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    assert list(config["segmenter"]["regions"]) == sorted(config["segmenter"]["regions"])
    first = run_predict(segmenter, study, tmp_path / "a", PredictConfig(overlap=0.0))
    regions = config["segmenter"]["regions"]
    config["segmenter"]["regions"] = {name: regions[name] for name in ("lesion", "core")}
    (copy / "config.json").write_text(json.dumps(config))
    from anycontrast.release.files import MANIFEST, write_manifest

    facts = json.loads((copy / MANIFEST).read_text())
    write_manifest(copy, {key: facts[key] for key in ("name", "kind", "license")})
    second = run_predict(copy, study, tmp_path / "b", PredictConfig(overlap=0.0))
    assert first["voxels"] == second["voxels"]


def test_a_box_on_the_files_own_grid_comes_back_voxel_for_voxel(tmp_path: Path) -> None:
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (30, -20, 10)
    like = _file(tmp_path, (12, 10, 8), affine)
    box = like.affine.copy()
    box[:3, 3] += box[:3, :3] @ (3, 2, 1)
    probability = np.random.default_rng(0).random((6, 5, 4), dtype=np.float32)
    found = on_input_grid(probability, _record((6, 5, 4), box), like)
    assert found.shape == (12, 10, 8)
    back = np.flip(found, 0)
    np.testing.assert_allclose(back[3:9, 2:7, 1:5], probability, atol=1e-5)
    rest = np.ones((12, 10, 8), dtype=bool)
    rest[3:9, 2:7, 1:5] = False
    assert np.abs(back[rest]).max() < 1e-5


def test_outside_the_box_the_probability_is_zero_on_a_tilted_grid(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(*OBLIQUE) @ np.diag([1.5, 1.5, 4.0])
    affine[:3, 3] = (-30, -30, -30)
    like = _file(tmp_path, (40, 40, 16), affine)
    box = np.eye(4)
    box[:3, 3] = like.affine[:3, :3] @ (20, 20, 8) + like.affine[:3, 3]
    found = on_input_grid(np.ones((8, 8, 8), dtype=np.float32), _record((8, 8, 8), box), like)
    corners = [found[i, j, k] for i in (0, -1) for j in (0, -1) for k in (0, -1)]
    assert corners == [0.0] * 8
    volume_mm3 = float(found.sum()) * abs(np.linalg.det(like.affine[:3, :3]))
    assert volume_mm3 == pytest.approx(8**3, rel=0.3)


def test_a_small_bright_spot_is_not_lost_on_a_finer_grid(tmp_path: Path) -> None:
    like = _file(tmp_path, (32, 32, 32), np.eye(4))
    probability = np.zeros((8, 8, 8), dtype=np.float32)
    probability[4, 4, 4] = 1.0
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    found = on_input_grid(probability, _record((8, 8, 8), affine), like)
    assert found[16, 16, 16] == found.max()
    assert found.max() == pytest.approx(1.0)


def test_one_contrast_is_enough(segmenter: Path, study: Path, tmp_path: Path) -> None:
    (study / "ADC.nii").unlink()
    report = run_predict(segmenter, study, tmp_path / "out", PredictConfig(overlap=0.0))
    assert report["contrasts_used"] == ["DWI"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "core.nii.gz",
        "lesion.nii.gz",
        "prediction.json",
    ]


def test_a_contrast_the_release_never_saw_is_used_and_named(
    segmenter: Path, study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (study / "ADC.nii").rename(study / "PDw.nii")
    report = run_predict(segmenter, study, tmp_path / "out", PredictConfig(overlap=0.0))
    assert "PDw" in report["contrasts_used"]
    assert report["contrasts_not_seen"] == ["PDw"]
    assert "never saw PDw" in caplog.text


def test_a_table_names_the_contrasts(segmenter: Path, study: Path, tmp_path: Path) -> None:
    (study / "DWI.nii.gz").rename(study / "scan_17.nii.gz")
    table = tmp_path / "table.csv"
    table.write_text("file,subject,session,contrast,label\nscan_17.nii.gz,a,1,DWI,\n")
    config = PredictConfig(table=str(table), overlap=0.0)
    report = run_predict(segmenter, study, tmp_path / "out", config)
    assert report["contrasts_used"] == ["DWI"]
    assert [(r["file"], r["code"]) for r in report["refused"]] == [("ADC.nii", "not_in_table")]


def test_predicting_again_replaces_and_keeps_what_is_not_ours(
    segmenter: Path, study: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    first = run_predict(segmenter, study, out, PredictConfig(overlap=0.0))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert run_predict(segmenter, study, out, PredictConfig(overlap=0.0)) == first
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert (out / "notes.txt").read_text() == "mine"


def test_an_encoder_release_cannot_predict(tiny_run: Config, study: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"encoder without a head: finetune it .*predict with"):
        run_predict(tiny_run.paths.release / "encoder", study, tmp_path / "out", PredictConfig())
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_usable_volume_says_why(
    segmenter: Path, study: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(StudyError, match=r"no usable volume .*no images.*name files by contrast"):
        run_predict(segmenter, empty, tmp_path / "out", PredictConfig())
    with pytest.raises(ManifestError, match="no such folder"):
        run_predict(segmenter, tmp_path / "nowhere", tmp_path / "out", PredictConfig())
    for image in study.glob("*.nii*"):
        image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(StudyError, match=r"DWI\.nii\.gz: (gzip_corrupt|truncated)"):
        run_predict(segmenter, study, tmp_path / "out", PredictConfig())
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_met_are_named(
    segmenter: Path, study: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"predict\.like must be one of .*DWI.*got T1w"):
        run_predict(segmenter, study, out, PredictConfig(like="T1w"))
    with pytest.raises(ConfigError, match=r"predict\.device=abacus cannot be used"):
        run_predict(segmenter, study, out, PredictConfig(device="abacus"))
    with pytest.raises(ConfigError, match="must not lie in the study's folder"):
        run_predict(segmenter, study, study / "out", PredictConfig())
    out.write_text("")
    with pytest.raises(ConfigError, match="OUT must be a folder"):
        run_predict(segmenter, study, out, PredictConfig())


def test_the_command_prints_what_it_wrote(
    segmenter: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(segmenter), str(study), str(tmp_path / "out"), "predict.overlap=0"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["written"] == ["core.nii.gz", "lesion.nii.gz"]
    assert all((tmp_path / "out" / name).is_file() for name in printed["written"])
