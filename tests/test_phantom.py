"""The phantom: physics, geometry, lesions, missing contrasts, and what is written to disk."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from anycontrast_datasets.pseudonym import PlainNaming, SplitRule
from anycontrast_datasets.sources.claims import SourceOptions
from anycontrast_datasets.sources.phantom import (
    PHANTOM_CONTRASTS,
    PhantomConfig,
    label_path,
    plan_study,
    scan,
    volume_path,
    write_phantom,
)
from anycontrast_datasets.sources.phantom_anatomy import (
    Head,
    load_atlas,
    make_head,
    smooth_field,
)
from anycontrast_datasets.sources.phantom_config import Stream, StudyPlan, stream_rng
from anycontrast_datasets.sources.phantom_lesions import plant_lesion
from anycontrast_datasets.sources.phantom_physics import (
    LESION_VALUES,
    TISSUE_NAMES,
    signals,
    site_protocols,
    susceptibility_phase,
)
from anycontrast_datasets.sources.phantom_scanner import ScannedImage, ScannedStudy, scan_study
from anycontrast_datasets.study import Study
from anycontrast_datasets.volume import read_volume

SPACING_MM = (4.0, 4.0, 4.0)
COMPLETE = PhantomConfig(
    num_studies=4, spacing_mm=SPACING_MM, always=list(PHANTOM_CONTRASTS), lesion_fraction=1.0
)
SMALL = PhantomConfig(num_studies=4, spacing_mm=(6.0, 6.0, 6.0), always=["DWI"], num_sites=2)


def _study(kind: str, index: int) -> tuple[Head, StudyPlan, ScannedStudy]:
    """One complete study and the head that was scanned, made again beside the scanner."""
    config = replace(COMPLETE, infarct_fraction=float(kind == "infarct"))
    plan = plan_study(config, index)
    assert plan.lesion == kind
    head = make_head(
        config.spacing_mm,
        head_rng=stream_rng(config.seed, Stream.HEAD, plan.subject),
        pose_rng=stream_rng(config.seed, Stream.POSE, plan.index),
    )
    head = plant_lesion(head, kind, stream_rng(config.seed, Stream.LESION, plan.index))
    return head, plan, scan_study(config, plan)


@pytest.fixture(scope="module", params=[0, 1, 2, 3], ids=lambda index: f"study{index}")
def infarct(request: pytest.FixtureRequest) -> tuple[Head, StudyPlan, ScannedStudy]:
    return _study("infarct", request.param)


@pytest.fixture(scope="module", params=[0, 1, 2, 3], ids=lambda index: f"study{index}")
def tumour(request: pytest.FixtureRequest) -> tuple[Head, StudyPlan, ScannedStudy]:
    return _study("tumour", request.param)


def _share_at_voxels(head: Head, image: ScannedImage, *names: str) -> npt.NDArray[np.float32]:
    """Tissue fraction at every stored voxel, found through the stored affine and the pose."""
    to_work = np.linalg.inv(head.affine) @ np.linalg.inv(head.pose) @ image.affine
    voxels = np.indices(image.array.shape).reshape(3, -1)
    places = to_work[:3, :3] @ voxels + to_work[:3, 3:]
    sampled = ndimage.map_coordinates(head.tissue(*names), places, order=1)
    return np.asarray(sampled.reshape(image.array.shape), dtype=np.float32)


def _mean(head: Head, study: ScannedStudy, contrast: str, tissue: str, least: float = 0.9) -> float:
    image = study.images[contrast]
    inside = _share_at_voxels(head, image, tissue) > least
    assert inside.sum() >= 2, f"{tissue} fills too few voxels of {contrast}"
    return float(image.array[inside].mean())


def test_healthy_tissue_has_the_order_each_contrast_is_known_for(
    infarct: tuple[Head, StudyPlan, ScannedStudy],
) -> None:
    head, _, study = infarct
    mean = {
        (contrast, tissue): _mean(head, study, contrast, tissue)
        for contrast in PHANTOM_CONTRASTS
        for tissue in ("gm", "wm", "csf")
    }
    for contrast in ("T1w", "T1wCE"):
        assert mean[contrast, "wm"] > 1.1 * mean[contrast, "gm"] > mean[contrast, "csf"]
    assert mean["T2w", "csf"] > 1.2 * mean["T2w", "gm"] > 1.2 * mean["T2w", "wm"]
    assert mean["FLAIR", "csf"] < 0.5 * mean["FLAIR", "gm"]
    assert mean["DWI", "csf"] < 0.7 * mean["DWI", "wm"]
    assert mean["GRE", "gm"] > mean["GRE", "wm"]
    assert 550 < mean["ADC", "wm"] < 1000
    assert 1800 < mean["ADC", "csf"] < 3300


def test_infarct_is_bright_on_trace_and_flair_and_dark_on_adc(
    infarct: tuple[Head, StudyPlan, ScannedStudy],
) -> None:
    head, _, study = infarct
    ratio = {
        contrast: _mean(head, study, contrast, "infarct", 0.7)
        / _mean(head, study, contrast, "gm", 0.9)
        for contrast in ("DWI", "ADC", "FLAIR", "T2w")
    }
    assert ratio["DWI"] > 1.4
    assert ratio["ADC"] < 0.75
    assert 1.05 < ratio["FLAIR"] < ratio["DWI"]
    assert ratio["T2w"] > 1.05


def test_rim_is_brightest_on_t1wce_only(tumour: tuple[Head, StudyPlan, ScannedStudy]) -> None:
    head, _, study = tumour
    rim = {c: _mean(head, study, c, "enhancing", 0.7) for c in ("T1w", "T1wCE")}
    white = {c: _mean(head, study, c, "wm") for c in ("T1w", "T1wCE")}
    assert rim["T1wCE"] > 1.15 * white["T1wCE"]
    assert rim["T1w"] < 0.95 * white["T1w"]


def test_tumour_label_has_its_three_parts_where_they_are(
    tumour: tuple[Head, StudyPlan, ScannedStudy],
) -> None:
    head, _, study = tumour
    label = study.label.array
    assert label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 2, 3, 4}
    for name in ("oedema", "core", "enhancing"):
        share = _share_at_voxels(head, study.label, name)
        assert share[label == LESION_VALUES[name]].mean() > 0.4
        assert share[label == 0].mean() < 0.02


def test_label_shares_the_grid_of_the_trace_image(
    infarct: tuple[Head, StudyPlan, ScannedStudy],
) -> None:
    _, _, study = infarct
    assert study.label_grid_of == "DWI"
    assert study.label.array.shape == study.images["DWI"].array.shape
    np.testing.assert_array_equal(study.label.affine, study.images["DWI"].affine)
    assert set(np.unique(study.label.array)) == {0, 1}


def test_label_falls_back_to_flair_then_to_the_first_contrast() -> None:
    for contrasts, expected in ((["T2w", "FLAIR"], "FLAIR"), (["GRE", "T2w"], "T2w")):
        config = replace(
            SMALL, always=contrasts, keep_probability={}, lesion_fraction=1.0, spacing_mm=SPACING_MM
        )
        study = scan_study(config, plan_study(config, 0))
        assert study.label_grid_of == expected
        assert study.label.array.shape == study.images[expected].array.shape
        assert study.label.array.any()


def test_healthy_study_has_an_empty_label() -> None:
    config = replace(SMALL, lesion_fraction=0.0)
    study = scan_study(config, plan_study(config, 0))
    assert not study.label.array.any()


def test_contrasts_of_a_study_agree_in_world_mm_on_different_grids(
    infarct: tuple[Head, StudyPlan, ScannedStudy],
) -> None:
    _, _, study = infarct
    centres = []
    for image in study.images.values():
        centre_vox = np.argwhere(image.array > 0).mean(axis=0)
        centres.append(image.affine[:3, :3] @ centre_vox + image.affine[:3, 3])
    # Different slice thickness cuts the brain's edge differently: one voxel is the tolerance.
    assert np.ptp(centres, axis=0).max() < SPACING_MM[0]
    shapes = {image.array.shape for image in study.images.values()}
    assert len(shapes) > 1
    np.testing.assert_array_equal(study.images["DWI"].affine, study.images["ADC"].affine)


def test_sites_differ_in_orientation_thickness_and_field_strength() -> None:
    protocols = [p for site in range(8) for p in site_protocols(0, site).values()]
    assert {"RAS", "LAS", "LPS", "PSR"} <= {p.orientation for p in protocols}
    assert {1.0, 1.5, 2.0} <= {p.spacing_factor[2] for p in protocols}
    assert {p.field_t for p in protocols if p.contrast == "T1w"} == {1.5, 3.0}
    assert {p.field_t for site in range(2) for p in site_protocols(5, site).values()} == {1.5, 3.0}


def test_flair_nearly_nulls_csf() -> None:
    flair = site_protocols(0, 0)["FLAIR"]
    signal_K = signals(flair)
    csf, gm = (signal_K[TISSUE_NAMES.index(name)] for name in ("csf", "gm"))
    assert abs(csf) < 0.1 * gm


def test_phase_of_a_sphere_is_zero_inside_and_a_dipole_outside() -> None:
    index = np.indices((48, 48, 48)) - 24
    inside = (index**2).sum(axis=0) <= 6**2
    phase = susceptibility_phase(inside.astype(np.float32), (1.0, 1.0, 1.0), field_t=3.0, te_s=0.02)
    pole, equator = phase[24, 24, 24 + 9], phase[24 + 9, 24, 24]
    assert pole > 0 > equator
    assert pole == pytest.approx(-2 * equator, rel=0.25)
    # Field at distance r on the axis: (2/3) ppm (a/r)^3 above the background.
    assert pole == pytest.approx(2 * np.pi * 42.577 * 3 * 0.02 * 2 / 3 * (6 / 9) ** 3, rel=0.25)
    assert abs(phase[24, 24, 24]) < 0.1 * pole


def test_images_are_whole_and_skull_stripped(infarct: tuple[Head, StudyPlan, ScannedStudy]) -> None:
    head, _, study = infarct
    for contrast, image in study.images.items():
        assert image.array.dtype == np.int16
        assert image.array.min() == 0, contrast
        outside = _share_at_voxels(head, image, *TISSUE_NAMES) < 1e-6
        assert not image.array[outside].any(), contrast
        assert 0.15 < (image.array > 0).mean() < 0.6, contrast
        assert np.isfinite(image.affine).all()


def test_skull_adds_bright_scalp_and_noise_outside_the_brain() -> None:
    config = replace(SMALL, skull=True, always=["T1w"], keep_probability={}, lesion_fraction=0.0)
    image = scan_study(config, plan_study(config, 0)).images["T1w"]
    assert image.sidecar["SkullStripped"] is False
    assert (image.array > 0).mean() > 0.7


def test_noise_is_rician_and_grows_with_the_setting() -> None:
    quiet, loud = (
        replace(SMALL, noise=noise, bias=0.0, always=["GRE"], keep_probability={}, skull=True)
        for noise in (0.0, 0.1)
    )
    plan = plan_study(quiet, 0)
    clean, noisy = (scan_study(c, plan).images["GRE"].array.astype(float) for c in (quiet, loud))
    air = clean == 0
    assert air.sum() > 500
    # Magnitude of pure complex noise is Rayleigh: mean over standard deviation is 1.91.
    assert noisy[air].mean() / noisy[air].std() == pytest.approx(1.913, rel=0.1)


def test_same_configuration_gives_the_same_voxels_and_another_seed_does_not() -> None:
    plan = plan_study(SMALL, 1)
    first, second = scan_study(SMALL, plan), scan_study(SMALL, plan)
    other = scan_study(replace(SMALL, seed=7), plan)
    np.testing.assert_array_equal(first.images["DWI"].array, second.images["DWI"].array)
    assert not np.array_equal(first.images["DWI"].array, other.images["DWI"].array)


def test_adding_contrasts_leaves_the_others_as_they_were() -> None:
    plan = replace(plan_study(SMALL, 0), contrasts=("T2w", "DWI"))
    alone = scan_study(SMALL, replace(plan, contrasts=("DWI",)))
    both = scan_study(SMALL, plan)
    np.testing.assert_array_equal(alone.images["DWI"].array, both.images["DWI"].array)


def test_sessions_share_the_head_but_not_the_pose() -> None:
    config = replace(SMALL, num_sessions=2)
    plans = [plan_study(config, index) for index in range(4)]
    assert [(p.subject, p.session) for p in plans] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert plans[0].site == plans[1].site
    heads = [
        make_head(
            config.spacing_mm,
            head_rng=stream_rng(0, Stream.HEAD, plan.subject),
            pose_rng=stream_rng(0, Stream.POSE, plan.index),
        )
        for plan in plans[:3]
    ]
    np.testing.assert_array_equal(heads[0].fractions_KXYZ, heads[1].fractions_KXYZ)
    assert not np.allclose(heads[0].pose, heads[1].pose)
    assert not np.allclose(heads[0].fractions_KXYZ, heads[2].fractions_KXYZ)


def test_atlas_is_a_brain_of_plausible_make_up() -> None:
    atlas = load_atlas(2.0, skull=False)
    litres = {name: float(share.sum()) * 8.0 / 1e6 for name, share in atlas.fractions.items()}
    assert 0.7 < litres["gm"] < 1.2
    assert 0.5 < litres["wm"] < 0.8
    assert 0.1 < litres["csf"] < 0.5
    total = sum(atlas.fractions.values(), np.zeros(1, dtype=np.float32))
    assert total.max() < 1.001
    # A lateral ventricle is CSF, the frontal white matter white, where the MNI frame has them.
    for point_mm, name in (((8, -10, 22), "csf"), ((-20, 30, 10), "wm"), ((0, -60, -30), "gm")):
        voxel = np.rint(np.linalg.inv(atlas.affine) @ [*point_mm, 1.0])[:3].astype(int)
        assert atlas.fractions[name][tuple(voxel)] > 0.6, name


def test_smooth_field_has_unit_variance_up_to_the_edge() -> None:
    fields = np.stack(
        [
            smooth_field(np.random.default_rng(i), (9, 7, 5), (3.0, 2.0, 6.0), correlation_mm=12.0)
            for i in range(600)
        ]
    )
    assert fields.shape[1:] == (9, 7, 5)
    np.testing.assert_allclose(fields.std(axis=0), 1.0, atol=0.15)
    np.testing.assert_allclose(fields.mean(axis=0), 0.0, atol=0.2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom") / "source"
    write_phantom(root, SMALL)
    return root


def _bytes(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_written_bytes_do_not_depend_on_threads(written: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path, SMALL, num_threads=1)
    assert _bytes(tmp_path) == _bytes(written)


def test_volumes_on_disk_are_the_scanned_ones(written: Path) -> None:
    plan = plan_study(SMALL, 0)
    study = scan_study(SMALL, plan)
    for contrast, image in study.images.items():
        loaded = read_volume(written / volume_path(plan, contrast))
        assert loaded.source_shape == image.array.shape
        np.testing.assert_allclose(loaded.source_affine, image.affine, atol=1e-3)
        assert loaded.array.max() == image.array.max()
        assert np.isfinite(loaded.array).all()


def test_scan_accepts_every_file_with_its_contrast_and_physics(written: Path) -> None:
    naming = PlainNaming("phantom", SplitRule("phantom", "salt", (0.8, 0.1, 0.1)))
    found = list(scan(written, SourceOptions(dataset="phantom", naming=naming)))
    studies = [item for item in found if isinstance(item, Study)]
    assert len(found) == len(studies) == SMALL.num_studies
    for index, study in enumerate(studies):
        plan = plan_study(SMALL, index)
        assert study.study_id == f"phantom-{index + 1:04d}-1"
        assert set(study.contrasts) == set(plan.contrasts)
        assert study.label is not None
        assert study.label.location == label_path(plan)
        protocols = site_protocols(SMALL.seed, plan.site)
        for volume in study.volumes:
            assert not volume.flags, volume.contrast
            protocol = protocols[volume.contrast]
            assert volume.descriptor.te_s == pytest.approx(protocol.te_s, abs=1e-4)
            assert volume.descriptor.field_t == protocol.field_t
            assert volume.descriptor.b_value_s_mm2 == protocol.b_value_s_mm2
            assert volume.descriptor.has_agent in ((True,) if protocol.has_agent else (None, False))


def test_second_run_reuses_and_reports_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(SMALL, num_studies=2)
    write_phantom(tmp_path, config)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    progress: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        write_phantom(
            tmp_path, config, on_progress=lambda done, total: progress.append((done, total))
        )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")} == times
    assert "reusing 2 studies" in caplog.text
    assert progress == [(2, 2)]


def test_a_missing_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(SMALL, num_studies=2)
    write_phantom(tmp_path, config)
    before = _bytes(tmp_path)
    (tmp_path / volume_path(plan_study(config, 1), "DWI")).unlink()
    write_phantom(tmp_path, config)
    assert _bytes(tmp_path) == before
    assert "is missing or cut" in caplog.text


def test_another_configuration_replaces_the_earlier_files(tmp_path: Path) -> None:
    write_phantom(tmp_path, replace(SMALL, num_studies=3))
    write_phantom(tmp_path, replace(SMALL, num_studies=1))
    assert not list(tmp_path.rglob("sub-0002*.*"))
    assert list(tmp_path.rglob("sub-0001*.nii.gz"))


def test_foreign_images_are_never_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "sub-01_T1w.nii.gz"
    foreign.write_bytes(b"somebody's scan")
    with pytest.raises(ValueError, match="not of this phantom"):
        write_phantom(tmp_path, SMALL)
    assert foreign.read_bytes() == b"somebody's scan"


def test_progress_counts_every_study(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    config = replace(SMALL, num_studies=3, always=[], keep_probability={"GRE": 1.0})
    write_phantom(tmp_path, config, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(1, 3), (2, 3), (3, 3)]
