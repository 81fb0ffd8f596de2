"""Preparation: one grid, one box, codes that give the values back."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.foreground import foreground_mask
from anycontrast_datasets.intensity import encode, unpack_occupancy
from anycontrast_datasets.prepare import PrepareConfig, prepare_study, prepare_volumes
from anycontrast_datasets.study import Label, Study, StudyArrays, StudyError, Volume
from anycontrast_datasets.volume import LoadedVolume, read_volume, write_volume

Triple = tuple[int, int, int]
REAL = Path(__file__).parents[2] / "shared" / "real_mri"
CENTRE_MM = np.array([3.0, -4.0, 5.0])
BLOB_MM = np.array([9.0, -10.0, 8.0])


def affine(
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    shape: Triple = (40, 44, 48),
    angle: float = 0.0,
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> npt.NDArray[np.float64]:
    """Return an affine whose grid centre lies at CENTRE_MM + shift, turned about z and x."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, -s], [0, s, c]]
    )
    out = np.eye(4)
    out[:3, :3] = turn * np.asarray(spacing)
    out[:3, 3] = CENTRE_MM + shift - out[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return out


def positions_mm(shape: Triple, matrix: npt.ArrayLike) -> npt.NDArray[np.float64]:
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return np.asarray(ijk @ np.asarray(matrix)[:3, :3].T + np.asarray(matrix)[:3, 3])


def head(
    shape: Triple,
    matrix: npt.NDArray[np.float64],
    *,
    air: float = 0.0,
    seed: int = 0,
    radius_mm: float = 16.0,
    gain: float = 1.0,
) -> npt.NDArray[np.float32]:
    """A ball of value ~200 with a bright blob at BLOB_MM; `air` is the noise around it."""
    mm = positions_mm(shape, matrix)
    rng = np.random.default_rng(seed)
    inside = np.linalg.norm(mm - CENTRE_MM, axis=-1) < radius_mm
    blob = 600 * np.exp(-0.5 * (np.linalg.norm(mm - BLOB_MM, axis=-1) / 3) ** 2)
    values = np.where(inside, 200 + blob + rng.normal(size=shape) * 5, 0)
    if air:
        values = np.hypot(values + rng.normal(size=shape) * air, rng.normal(size=shape) * air)
    return (values * gain).astype(np.float32)


def loaded(array: npt.NDArray[np.float32], matrix: npt.NDArray[np.float64]) -> LoadedVolume:
    x, y, z = (float(s) for s in np.linalg.norm(matrix[:3, :3], axis=0))
    return LoadedVolume(array, matrix, array.shape, matrix, (x, y, z))


def study_of(
    volumes: dict[str, LoadedVolume], label: LoadedVolume | None = None, study_id: str = "case-1"
) -> Study:
    return Study(
        study_id=study_id,
        dataset="made",
        subject_id="case",
        session_id="1",
        split="train",
        volumes=tuple(
            Volume(
                contrast=name,
                location="",
                shape=v.array.shape,
                spacing_mm=v.spacing_mm,
                affine=tuple(map(tuple, v.affine.tolist())),
            )
            for name, v in volumes.items()
        ),
        label=None
        if label is None
        else Label(
            location="",
            shape=label.array.shape,
            affine=tuple(map(tuple, label.affine.tolist())),
            grid_of=next(iter(volumes)),
        ),
    )


def prepare(
    volumes: dict[str, LoadedVolume], label: LoadedVolume | None = None, **config: Any
) -> StudyArrays:
    return prepare_volumes(study_of(volumes, label), volumes, label, PrepareConfig(**config))


def decoded(arrays: StudyArrays, contrast: str) -> npt.NDArray[np.float64]:
    record = next(v for v in arrays.record.volumes if v.contrast == contrast)
    codes = arrays.codes[contrast]
    return np.where(codes == 0, 0, codes * record.scale + record.offset)


def mixed_study() -> dict[str, LoadedVolume]:
    """Four contrasts on four grids: 1 mm, anisotropic, oblique, oblique and shifted."""
    specs = {
        "T2w": ((40, 44, 16), (1.0, 1.0, 3.0), 0.0, (0, 0, 0)),
        "T1w": ((40, 44, 48), (1.0, 1.0, 1.0), 0.15, (0, 0, 0)),
        "FLAIR": ((50, 55, 40), (0.8, 0.8, 1.2), -0.2, (1.5, 2.5, -1.0)),
        "ADC": ((26, 28, 16), (2.0, 2.0, 3.0), 0.0, (0.7, 0.1, 0.3)),
    }
    volumes = {}
    for name, (shape, spacing, angle, shift) in specs.items():
        matrix = affine(spacing, shape, angle, shift)
        volumes[name] = loaded(head(shape, matrix), matrix)
    return volumes


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 1.5, 2.0), None])
def test_a_blob_lies_at_the_same_millimetre_in_every_contrast(
    spacing: tuple[float, float, float],
) -> None:
    arrays = prepare(mixed_study(), spacing_mm=spacing)
    mm = positions_mm(arrays.record.shape, arrays.record.affine)
    for contrast in arrays.record.contrasts:
        excess = np.clip(decoded(arrays, contrast) - 350, 0, None)
        centroid = (mm * excess[..., None]).reshape(-1, 3).sum(0) / excess.sum()
        worst = np.abs(centroid - BLOB_MM) / arrays.record.spacing_mm
        assert worst.max() <= 0.5, (contrast, centroid)


def test_reference_follows_the_priority_and_sets_the_axes() -> None:
    volumes = mixed_study()
    arrays = prepare(volumes)
    assert arrays.record.reference == "T1w"
    axes = np.asarray(arrays.record.affine)[:3, :3]
    np.testing.assert_allclose(axes, volumes["T1w"].affine[:3, :3], atol=1e-9)
    assert prepare(volumes, reference=["ADC"]).record.reference == "ADC"
    assert prepare({"GRE": volumes["T2w"]}, reference=["T1w"]).record.reference == "GRE"


def test_contrasts_keep_the_order_of_the_study() -> None:
    assert prepare(mixed_study()).record.contrasts == ("T2w", "T1w", "FLAIR", "ADC")


def test_own_grid_is_kept_to_the_voxel() -> None:
    matrix = affine()
    volume = loaded(head((40, 44, 48), matrix), matrix)
    arrays = prepare({"T1w": volume})
    start = np.rint(np.linalg.inv(matrix) @ np.asarray(arrays.record.affine)[:, 3])[:3].astype(int)
    stop = start + arrays.record.shape
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert all(start >= 0)
    record = arrays.record.volumes[0]
    foreground = arrays.codes["T1w"] > 0
    kept = foreground & (arrays.codes["T1w"] < arrays.codes["T1w"].max())
    source = volume.array[box]
    error = np.abs(decoded(arrays, "T1w") - source)[kept]
    assert error.max() <= record.scale * 0.5 + 1e-3
    np.testing.assert_array_equal(foreground, source != 0)


def test_box_is_a_multiple_inside_the_field_of_view_when_it_fits() -> None:
    arrays = prepare(mixed_study(), box_multiple_vox=8)
    assert all(n % 8 == 0 for n in arrays.record.shape)
    assert all(n <= room for n, room in zip(arrays.record.shape, (40, 44, 48), strict=True))
    mm = positions_mm(arrays.record.shape, arrays.record.affine)
    assert all(
        (arrays.codes[c] > 0)[np.linalg.norm(mm - CENTRE_MM, axis=-1) < 13].all()
        for c in arrays.codes
    )


def test_box_larger_than_the_field_of_view_is_padded_with_background() -> None:
    shape = (20, 21, 22)
    matrix = affine(shape=shape)
    volume = loaded(head(shape, matrix, radius_mm=100), matrix)
    arrays = prepare({"T1w": volume})
    assert arrays.record.shape == (32, 32, 32)
    assert np.count_nonzero(arrays.codes["T1w"]) == volume.array.size
    mm = positions_mm(arrays.record.shape, arrays.record.affine)[arrays.codes["T1w"] > 0]
    np.testing.assert_allclose(mm[0], matrix[:3, 3], atol=1e-9)


def test_outside_a_small_field_of_view_is_background() -> None:
    matrix = affine()
    slab = affine(shape=(40, 44, 10))
    volumes = {
        "T1w": loaded(head((40, 44, 48), matrix), matrix),
        "T2w": loaded(head((40, 44, 10), slab), slab),
    }
    arrays = prepare(volumes)
    mm = positions_mm(arrays.record.shape, arrays.record.affine)
    beyond = np.abs(mm[..., 2] - CENTRE_MM[2]) > 5
    assert not arrays.codes["T2w"][beyond].any()
    assert arrays.codes["T2w"][~beyond].any()


@pytest.mark.parametrize("air", [0.0, 6.0])
def test_foreground_is_the_head_with_and_without_noise_in_the_air(air: float) -> None:
    matrix = affine()
    volume = head((40, 44, 48), matrix, air=air)
    distance = np.linalg.norm(positions_mm(volume.shape, matrix) - CENTRE_MM, axis=-1)
    mask = foreground_mask(volume, (1, 1, 1))
    assert mask[distance < 16].all()
    assert not mask[distance > 22].any()


def test_dark_middle_of_a_noisy_head_is_foreground() -> None:
    matrix = affine()
    volume = head((40, 44, 48), matrix, air=3.0)
    distance = np.linalg.norm(positions_mm(volume.shape, matrix) - CENTRE_MM, axis=-1)
    volume[distance < 6] = 1.0
    assert foreground_mask(volume, (1, 1, 1))[distance < 6].all()


def test_negative_voxels_of_a_stripped_brain_are_foreground_and_come_back() -> None:
    matrix = affine()
    values = head((40, 44, 48), matrix)
    values[values != 0] -= 210
    values[20, 22, 24] = 0
    arrays = prepare({"T1w": loaded(values, matrix)})
    back = decoded(arrays, "T1w")
    assert back.min() < -10
    assert arrays.record.volumes[0].num_foreground == np.count_nonzero(values) + 1


def test_specks_of_noise_do_not_enlarge_the_box() -> None:
    matrix = affine(shape=(64, 64, 64))
    values = head((64, 64, 64), matrix, radius_mm=10)
    values[1, 2, 3] = values[60, 60, 60] = 4
    assert prepare({"T1w": loaded(values, matrix)}).record.shape == (32, 32, 32)


def test_statistics_are_those_of_the_foreground() -> None:
    matrix = affine()
    values = head((40, 44, 48), matrix)
    record = prepare({"T1w": loaded(values, matrix)}).record.volumes[0]
    inside = values[values != 0]
    low, high = np.percentile(inside, [0.5, 99.5])
    clipped = np.clip(inside, low, high)
    assert record.p0_5 == pytest.approx(low, rel=1e-5)
    assert record.p99_5 == pytest.approx(high, rel=1e-5)
    assert record.mean == pytest.approx(clipped.mean(), rel=1e-5)
    assert record.std == pytest.approx(clipped.std(), rel=1e-5)
    gain, bias, low_z, high_z = record.intensity_map
    z = np.clip(np.arange(1, 4096) * gain + bias, low_z, high_z)
    assert z.min() == pytest.approx(low_z) and z.max() == pytest.approx(high_z)


def test_outliers_saturate_but_not_in_a_measured_map() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1000, 50, size=(40, 40, 40)).astype(np.float32)
    values[0, 0, 0] = 60_000
    mask = np.ones(values.shape, dtype=np.bool_)
    weighted, measured = encode(values, mask, "T1w"), encode(values, mask, "ADC")
    assert weighted.codes[0, 0, 0] == weighted.codes.max() < measured.codes[0, 0, 0] == 4095
    assert weighted.scale * weighted.codes.max() + weighted.offset < 2000
    assert measured.scale * 4095 + measured.offset == pytest.approx(60_000, rel=1e-5)
    for coded in (weighted, measured):
        back = coded.codes * coded.scale + coded.offset
        is_kept = coded.codes < coded.codes.max()
        assert np.count_nonzero(~is_kept) < 0.001 * values.size
        assert np.abs(back - values)[is_kept].max() <= 0.51 * coded.scale
        assert coded.codes.min() == 1


def test_steps_follow_the_noise_unless_told_otherwise() -> None:
    matrix = affine((1.0, 1.0, 1.0))
    volumes = {"T1w": loaded(head((40, 44, 48), matrix), matrix)}
    fine, coarse = prepare(volumes, codes_per_noise=None), prepare(volumes)
    assert fine.codes["T1w"].max() == 4095 > 2 * coarse.codes["T1w"].max()
    assert coarse.record.volumes[0].scale == pytest.approx(5 / 16, rel=0.1), "noise of `head`: 5"
    assert prepare(volumes, codes_per_noise=32).record.volumes[0].scale == pytest.approx(
        coarse.record.volumes[0].scale / 2
    )


def test_occupancy_names_exactly_the_blocks_with_foreground() -> None:
    arrays = prepare(mixed_study())
    for record in arrays.record.volumes:
        blocks = unpack_occupancy(record.occupancy, arrays.record.shape)
        for index in np.ndindex(blocks.shape):
            at = tuple(slice(8 * i, 8 * i + 8) for i in index)
            assert blocks[index] == arrays.codes[record.contrast][at].any()


def test_label_keeps_its_values_and_its_place_and_is_inside_the_box() -> None:
    volumes = mixed_study()
    matrix = affine((0.8, 0.8, 1.2), (50, 55, 40), -0.2, (1.5, 2.5, -1.0))
    near = np.linalg.norm(positions_mm((50, 55, 40), matrix) - BLOB_MM, axis=-1)
    values = (4 * (near < 4) + 0 * near).astype(np.float32)
    values[20, 20, 20] = 255
    arrays = prepare(volumes, loaded(values, matrix))
    assert arrays.label is not None
    assert arrays.label.dtype == np.uint8 and arrays.label.shape == arrays.record.shape
    assert arrays.record.label_values == (4, 255) and arrays.record.has_label
    mm = positions_mm(arrays.record.shape, arrays.record.affine)[arrays.label == 4]
    assert np.abs(mm.mean(0) - BLOB_MM).max() <= 0.5


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0])
def test_label_values_that_are_no_labels_are_refused(value: float) -> None:
    matrix = affine()
    label = np.zeros((40, 44, 48), np.float32)
    label[3, 4, 5] = value
    volume = loaded(head(label.shape, matrix), matrix)
    with pytest.raises(StudyError, match=r"whole numbers 0\.\.255") as caught:
        prepare({"T1w": volume}, loaded(label, matrix))
    assert caught.value.code == "label_values"


def test_contrast_without_foreground_is_refused_by_name() -> None:
    matrix, far = affine(), affine(shift=(500, 0, 0))
    volumes = {
        "T1w": loaded(head((40, 44, 48), matrix), matrix),
        "FLAIR": loaded(head((40, 44, 48), matrix), far),
    }
    with pytest.raises(StudyError, match=r"case-1 FLAIR.*foreground") as caught:
        prepare(volumes)
    assert caught.value.code == "empty_foreground"


def test_constant_foreground_is_refused() -> None:
    matrix = affine()
    values = (head((40, 44, 48), matrix) != 0).astype(np.float32)
    with pytest.raises(StudyError, match="must vary") as caught:
        prepare({"T1w": loaded(values, matrix)})
    assert caught.value.code == "empty_foreground"


def test_box_beyond_the_limit_is_refused() -> None:
    with pytest.raises(StudyError, match="max_shape") as caught:
        prepare(mixed_study(), max_shape=(16, 512, 512))
    assert caught.value.code == "box_too_large"


@pytest.mark.parametrize(
    "values",
    [
        {"spacing_mm": (1.0, 0.0, 1.0)},
        {"box_multiple_vox": 12},
        {"max_shape": (8, 512, 512)},
        {"reference": ["T9w"]},
        {"codes_per_noise": 0.5},
        {"codes_per_noise": float("nan")},
    ],
)
def test_bad_config_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PrepareConfig(**values)


def written_study(folder: Path) -> tuple[Study, dict[str, Path]]:
    """Write two contrasts and a label as files; return the study and where they are."""
    shape, matrix = (24, 26, 28), affine(shape=(24, 26, 28), angle=0.1)
    files, volumes = {}, []
    for name in ("T1w", "FLAIR"):
        files[name] = folder / f"{name}.nii.gz"
        write_volume(files[name], head(shape, matrix, radius_mm=9, seed=len(files)), matrix)
        volumes.append(
            Volume(
                contrast=name,
                location="",
                shape=shape,
                spacing_mm=(1.0, 1.0, 1.0),
                affine=tuple(map(tuple, matrix.tolist())),
                sha256=sha256_file(files[name]),
            )
        )
    files["label"] = folder / "label.nii.gz"
    write_volume(files["label"], np.zeros(shape, np.uint8), matrix)
    label = Label(location="", shape=shape, affine=volumes[0].affine, grid_of="T1w")
    study = Study(
        study_id="case-1",
        dataset="made",
        subject_id="case",
        session_id="1",
        split="val",
        volumes=tuple(volumes),
        label=label,
    )
    return study, files


def test_files_are_read_and_an_empty_label_is_a_label(tmp_path: Path) -> None:
    study, files = written_study(tmp_path)
    arrays = prepare_study(study, files, PrepareConfig())
    assert arrays.record.contrasts == ("T1w", "FLAIR")
    assert arrays.record.has_label and arrays.record.label_values == ()
    np.testing.assert_array_equal(arrays.label, 0)


def test_changed_file_is_refused_without_naming_its_path(tmp_path: Path) -> None:
    study, files = written_study(tmp_path)
    array = read_volume(files["FLAIR"]).array
    write_volume(files["FLAIR"], array + np.float32(1), affine(shape=array.shape, angle=0.1))
    with pytest.raises(StudyError, match=r"case-1 FLAIR.*scanned") as caught:
        prepare_study(study, files, PrepareConfig())
    assert caught.value.code == "source_changed" and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "code"), [("cut", None), ("gone", None), ("unknown", "missing_file")]
)
def test_unreadable_file_is_refused_without_naming_its_path(
    tmp_path: Path, damage: str, code: str | None
) -> None:
    study, files = written_study(tmp_path)
    if damage == "cut":
        files["T1w"].write_bytes(files["T1w"].read_bytes()[:-8])
    elif damage == "gone":
        files["T1w"].unlink()
    else:
        del files["T1w"]
    with pytest.raises(StudyError, match="case-1 T1w") as caught:
        prepare_study(study, files, PrepareConfig())
    assert code in (None, caught.value.code)
    assert str(tmp_path) not in str(caught.value)


def test_real_stripped_brain_keeps_every_nonzero_voxel() -> None:
    folder = REAL / "openms_cross" / "patient19"
    if not folder.is_dir():
        pytest.skip("the real data are not here")
    volumes = {
        c: read_volume(folder / f"{f}.nii.gz") for c, f in {"T1w": "T1", "FLAIR": "FLAIR"}.items()
    }
    label = read_volume(folder / "lesion_mask.nii.gz", allow_constant=True)
    arrays = prepare(volumes, label, spacing_mm=None)
    assert arrays.label is not None
    assert np.count_nonzero(label.array) == np.count_nonzero(arrays.label)
    for record in arrays.record.volumes:
        nonzero = np.count_nonzero(volumes[record.contrast].array)
        assert nonzero * 0.999 <= record.num_foreground <= nonzero * 1.05
