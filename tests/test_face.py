"""Faces: built heads with a face are told from those without, and none reaches a manifest."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.face import FaceFinding, decide_face, detect_face, stated_face
from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import read_manifest
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.study import ManifestError
from anycontrast_datasets.volume import write_volume
from anycontrast_datasets.work_copy import make_work_copy

FloatArray = npt.NDArray[np.float32]
SHAPE = (50, 63, 54)
SPACING = 4.0
NUM_FACES = 20


def built_head(seed: int, *, has_face: bool) -> FloatArray:
    """A head with scalp, bone and brain, and a jaw and a nose, or nothing below the brow.

    Size, pitch, nose and noise follow the seed. [X, Y, Z] RAS+; the vertex is 200 mm above the
    bottom.
    """
    rng = np.random.default_rng(seed)
    scale, pitch = rng.uniform(0.95, 1.08), np.deg2rad(rng.uniform(-8, 8))
    x, y, z = np.meshgrid(
        (np.arange(SHAPE[0]) - SHAPE[0] / 2) * SPACING / scale,
        (np.arange(SHAPE[1]) - 30) * SPACING / scale,
        (np.arange(SHAPE[2]) - 29) * SPACING / scale,
        indexing="ij",
    )
    y, z = np.cos(pitch) * y - np.sin(pitch) * z, np.sin(pitch) * y + np.cos(pitch) * z

    def ball(centre: tuple[float, float, float], half: tuple[float, float, float]) -> FloatArray:
        parts = ((a - c) / h for a, c, h in zip((x, y, z), centre, half, strict=True))
        squares: FloatArray = np.sum([part**2 for part in parts], axis=0, dtype=np.float32)
        return np.sqrt(squares)

    skull = ball((0, 0, 0), (76, 96, 92))
    neck = ball((0, -15, -95), (55, 58, 75))
    head = (skull < 1) | (neck < 1)
    if has_face:
        nose = rng.uniform(18, 26)
        head |= ball((0, 38, -62), (58, 58, 62)) < 1
        head |= ball((0, 92, -58), (11, nose, 22)) < 1
    else:
        head &= ~((y > 20) & (z < -22)) | (ball((0, 0, 0), (60, 80, 78)) < 1)
    image = np.where(head, 420.0, 0.0)
    image[(skull < 0.94)] = 60.0
    brain = skull < 0.86
    image[brain] = 300.0 + 90.0 * np.sin(x[brain] / 7) * np.cos(y[brain] / 8)
    noise = rng.normal(0, rng.uniform(4, 14), (2, *SHAPE))
    magnitude: FloatArray = np.hypot(image + noise[0], noise[1]).astype(np.float32)
    return magnitude


def put(path: Path, seed: int, *, has_face: bool) -> None:
    path.parent.mkdir(exist_ok=True)
    array = built_head(seed, has_face=has_face).astype(np.int16)
    write_volume(path, array, np.diag([SPACING, SPACING, SPACING, 1.0]))


def state_of(array: FloatArray, spacing: float = SPACING) -> str:
    return detect_face(make_work_copy(array, (spacing,) * 3)).state


def test_twenty_faces_in_none_in_the_manifest_and_twenty_without_all_in(tmp_path: Path) -> None:
    contrasts = ("T1w", "ce-gd_T1w", "T2star", "FLAIR", "PDw")
    for seed in range(NUM_FACES):
        for kind in ("face", "none"):
            name = f"sub-{kind}{seed}_{contrasts[seed % 5]}.nii"
            put(tmp_path / "in" / name, seed, has_face=kind == "face")
    config = ScanConfig(source="bids", root=str(tmp_path / "in"), dataset="d")
    summary = run_scan(config, tmp_path / "out")
    assert (summary.accepted, summary.by_code) == (NUM_FACES, {"face_present": NUM_FACES})
    assert summary.by_face == {"defaced": NUM_FACES}
    refused = read_ledger(tmp_path / "out/private/ledger.csv")
    assert all("face" in refusal.location for refusal in refused)
    assert all("scan.faces=allow" in refusal.remedy for refusal in refused)


@pytest.mark.parametrize(("faces", "flags"), [("flag", ("face_present",)), ("allow", ())])
def test_a_policy_keeps_faces_and_the_state_says_so(
    tmp_path: Path, faces: str, flags: tuple[str, ...]
) -> None:
    put(tmp_path / "in/sub-1_T1w.nii", 0, has_face=True)
    config = ScanConfig(source="bids", root=str(tmp_path / "in"), faces=faces)  # type: ignore[arg-type]
    run_scan(config, tmp_path / "out")
    (volume,) = read_manifest(tmp_path / "out/manifest.parquet")[0].volumes
    assert (volume.face, volume.flags) == ("present", flags)


def test_pictures_that_are_not_checked_are_asked_for_faces_all_the_same(tmp_path: Path) -> None:
    put(tmp_path / "in/sub-1_T1w.nii", 0, has_face=True)
    config = ScanConfig(source="bids", root=str(tmp_path / "in"), check_pictures=False)
    with pytest.raises(ManifestError, match="face_present"):
        run_scan(config, tmp_path / "out")


def test_diffusion_is_kept_with_its_state(tmp_path: Path) -> None:
    put(tmp_path / "in/sub-1_dwi.nii", 0, has_face=True)
    run_scan(ScanConfig(source="bids", root=str(tmp_path / "in")), tmp_path / "out")
    (volume,) = read_manifest(tmp_path / "out/manifest.parquet")[0].volumes
    assert (volume.contrast, volume.face) == ("DWI", "present")


def test_slabs_and_other_spacings() -> None:
    face, none = (built_head(3, has_face=value) for value in (True, False))
    assert state_of(face[:, :, 12:]) == "present"
    assert state_of(face[:, :, 30:]) == "defaced"  # ends above the eyes
    fine = np.repeat(np.repeat(np.repeat(face, 2, 0), 2, 1), 2, 2)
    assert state_of(fine, SPACING / 2) == "present"
    thick = np.ascontiguousarray(face[:, :, ::2])
    assert detect_face(make_work_copy(thick, (SPACING, SPACING, 2 * SPACING))).state == "present"
    assert state_of(none) == "defaced"


def test_a_brain_is_stripped_and_a_crop_shows_no_surface() -> None:
    shape = (60, 70, 50)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum((axis / 0.75) ** 2 for axis in axes))
    brain = np.where(radius < 1, 300.0, 0.0).astype(np.float32)
    assert state_of(brain, 3.0) == "stripped"
    full = np.random.default_rng(0).uniform(100, 200, (40, 40, 40)).astype(np.float32)
    assert state_of(full) == "defaced"
    assert state_of(brain[:10, :10, :10], 3.0) == "defaced"
    assert state_of(np.zeros((40, 40, 40), dtype=np.float32)) == "unknown"


@pytest.mark.parametrize(
    ("name", "sidecar", "state"),
    [
        ("sub-1_T1w.nii.gz", {}, None),
        ("sub-1_T1w_defaced.nii.gz", {}, "defaced"),
        ("sub-1_desc-pydeface_T1w.nii.gz", {}, "defaced"),
        ("sub-1_T1w_mri_reface.nii.gz", {}, "refaced"),
        ("sub-1_desc-brain_T1w.nii.gz", {}, "stripped"),
        ("sub-brainard_T1w.nii.gz", {}, None),
        ("x.nii", {"Defaced": True}, "defaced"),
        ("x.nii", {"SkullStripped": True}, "stripped"),
        ("x.nii", {"SkullStripped": False}, None),
        ("x.nii", {"DeidentificationMethod": ["mri_reface 0.3"]}, "refaced"),
        ("x.nii", {"DeidentificationMethodCodeSequence": [{"CodeValue": "113102"}]}, "defaced"),
    ],
)
def test_what_names_and_sidecars_claim(
    name: str, sidecar: dict[str, object], state: str | None
) -> None:
    assert stated_face(name, sidecar) == state


def test_a_claim_settles_the_unknown_but_not_a_measured_face() -> None:
    present, unknown = FaceFinding(state="present"), FaceFinding(state="unknown")
    assert decide_face(present, "defaced").state == "present"
    assert decide_face(present, "refaced").state == "refaced"
    assert decide_face(unknown, "stripped").state == "stripped"
    assert decide_face(unknown, None).state == "unknown"
    assert decide_face(FaceFinding(state="stripped"), "refaced").state == "stripped"
