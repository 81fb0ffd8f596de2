"""Studies to measure on: four contrasts of 160 x 192 x 160 from the MNI tissue maps, with noise.

Every head is a random affine and smooth deformation of the atlas with a rim around the brain, a
receive field and Rician noise, so that compressors find what a scanner would give them: a zero
background of a little under half the box, and low bits that are noise. Kept on disk between runs
under a name made of everything the bytes depend on.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.contrast import resolve_contrast
from anycontrast_datasets.foreground import foreground_mask
from anycontrast_datasets.intensity import BLOCK_VOX, encode, pack_occupancy
from anycontrast_datasets.prepare import PREPARE_VERSION
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store.codec import DEFAULT_CODEC, DEFAULT_LEVEL
from anycontrast_datasets.store.volume_index import DATASET_NAME, SCHEMA_VERSION
from anycontrast_datasets.study import StudyArrays, StudyError, StudyRecord, VolumeRecord
from anycontrast_datasets.volume import write_volume

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise when the same options give other voxels than before."""
SHAPE = (160, 192, 160)
AFFINE = ((1.0, 0, 0, -79.0), (0, 1.0, 0, -112.0), (0, 0, 1.0, -70.0), (0, 0, 0, 1.0))
"""A box of 1 mm voxels around the brain, RAS+ mm."""
SIGNALS = {
    "T1w": (0.62, 0.95, 0.18, 0.80),
    "T2w": (0.70, 0.52, 1.00, 0.45),
    "FLAIR": (0.80, 0.62, 0.12, 0.55),
    "GRE": (0.75, 0.66, 0.90, 0.35),
}
"""Signal of grey matter, white matter, fluid and rim, over the brightest."""
NOISE = 0.03
RIM_MM = 9.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BenchStudies:
    """The same studies as NIfTI files and as a volume store."""

    files: tuple[dict[str, Path], ...]
    """Per study: contrast -> `.nii.gz`; int16 in even studies, float32 in odd ones."""
    store: Path
    """Folder of a volume store, one shard."""


def bench_studies(folder: Path, num_studies: int) -> BenchStudies:
    """Make the studies, or find them made.

    Args:
        folder: Cache; made if need be, about 42 MB a study.
        num_studies: How many; study i is the same for any number.

    Raises:
        ManifestError: If nilearn, whose tissue maps are used, is not installed.
    """
    root = folder / f"studies-{FORMAT}"
    versions = f"{FORMAT}-{SCHEMA_VERSION}-{PREPARE_VERSION}-{DEFAULT_CODEC}-{DEFAULT_LEVEL}"
    store = folder / f"store-{versions}-{num_studies}"
    for number in range(num_studies):
        if not all(path.is_file() for path in _paths(root, number).values()):
            logger.info("making study %d of %d", number + 1, num_studies)
            _write_files(root, number)
    if not (store / DATASET_NAME).is_file():
        write_arrays(store, [[_arrays(root, number) for number in range(num_studies)]])
    return BenchStudies(tuple(_paths(root, n) for n in range(num_studies)), store)


def taken_studies(root: Path, folder: Path, num_studies: int) -> BenchStudies:
    """Take studies from a folder of study folders, and make their volume store.

    Args:
        root: Study folders of the same contrasts, one `.nii.gz` each, named after the contrast; all
            of a study on one grid.
        folder: Cache of the store; made anew each time.
        num_studies: The first so many, by name.

    Raises:
        StudyError: If there is no study, or its files do not fit together.
    """
    files = []
    studies = []
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    for number, study in enumerate(folders[:num_studies]):
        paths = {
            resolve_contrast(path.name.removesuffix(".nii.gz")): path
            for path in sorted(study.glob("*.nii.gz"))
        }
        files.append(paths)
        studies.append(_taken_study(f"bench-{number:03d}", paths))
    names = {tuple(paths) for paths in files}
    if len(names) != 1 or not all(names):
        raise StudyError(
            f"bench: {root} must hold folders of the same contrasts as .nii.gz, found "
            f"{sorted(names)}"
        )
    store = folder / f"store-taken-{SCHEMA_VERSION}"
    shutil.rmtree(store, ignore_errors=True)
    write_arrays(store, [studies])
    return BenchStudies(tuple(files), store)


def coded_study(
    study_id: str, volumes: dict[str, Floats], affine: tuple[tuple[float, ...], ...]
) -> StudyArrays:
    """Code volumes on one grid whose background is 0, without cutting them to the foreground.

    Args:
        study_id: Of the record.
        volumes: Contrast -> [X, Y, Z] float32, every side a multiple of 8.
        affine: Voxel ijk -> RAS+ mm.
    """
    codes: dict[str, npt.NDArray[np.int16]] = {}
    records = []
    spacing = tuple(float(s) for s in np.linalg.norm(np.array(affine)[:3, :3], axis=0))
    for contrast, array in volumes.items():
        coded = encode(array, array != 0, contrast)
        codes[contrast] = coded.codes
        records.append(
            VolumeRecord(
                contrast=contrast,
                scale=coded.scale,
                offset=coded.offset,
                p0_5=coded.p0_5,
                p99_5=coded.p99_5,
                mean=coded.mean,
                std=coded.std,
                num_foreground=coded.num_foreground,
                occupancy=pack_occupancy(coded.codes),
                source_spacing_mm=(spacing[0], spacing[1], spacing[2]),
            )
        )
    shape = next(iter(codes.values())).shape
    record = StudyRecord(
        study_id=study_id,
        dataset="bench",
        subject_id=study_id,
        session_id="1",
        split="train",
        shape=shape,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        affine=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine),
        volumes=tuple(records),
        reference=records[0].contrast,
    )
    return StudyArrays(record=record, codes=codes)


def make_volumes(number: int) -> dict[str, Floats]:
    """Make the four volumes of study `number`: [160, 192, 160] float32, background exactly 0."""
    from scipy import ndimage

    from anycontrast_datasets.sources.phantom_anatomy import smooth_field

    rng = np.random.default_rng([FORMAT, number])
    coordinates = _atlas_coordinates(rng)
    tissues = [
        ndimage.map_coordinates(tissue, coordinates, order=1, output=np.float32)
        for tissue in _tissues()
    ]
    is_head = np.sum(tissues, axis=0) > 0.5
    volumes = {}
    for contrast, signals in SIGNALS.items():
        image = np.zeros(SHAPE, dtype=np.float32)
        for signal, tissue in zip(signals, tissues, strict=True):
            image += np.float32(signal) * tissue
        image *= np.exp(0.12 * smooth_field(rng, SHAPE, (1.0, 1.0, 1.0), correlation_mm=90.0))
        noise = rng.standard_normal((2, *SHAPE), dtype=np.float32) * np.float32(NOISE)
        image = np.hypot(image + noise[0], noise[1])
        gain = np.exp(rng.uniform(np.log(1500), np.log(4000)))
        volumes[contrast] = np.asarray(image * is_head * gain, dtype=np.float32)
    return volumes


def _tissues() -> list[Floats]:
    """Grey matter, white matter, fluid, and a rim around them, on the atlas grid."""
    from scipy import ndimage

    from anycontrast_datasets.sources.phantom_anatomy import load_atlas

    fractions = load_atlas(1.0).fractions
    brain = np.sum(list(fractions.values()), axis=0) > 0.5
    distance = ndimage.distance_transform_edt(~brain)
    rim = ((distance > 0) & (distance <= RIM_MM)).astype(np.float32)
    return [fractions["gm"], fractions["wm"], fractions["csf"], rim]


def _atlas_coordinates(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw where in the atlas every voxel comes from: [3, X, Y, Z] atlas voxels."""
    from scipy.spatial.transform import Rotation

    from anycontrast_datasets.sources.phantom_anatomy import load_atlas, smooth_field

    turn = Rotation.from_euler("xyz", rng.normal(0, 4, 3), degrees=True).as_matrix()
    to_atlas = np.linalg.inv(load_atlas(1.0).affine)
    matrix = to_atlas[:3, :3] @ (turn / rng.uniform(0.97, 1.05, 3)) @ np.array(AFFINE)[:3, :3]
    centre = (np.array(SHAPE) - 1) / 2
    middle = to_atlas @ np.array(AFFINE) @ np.array([*centre, 1.0])
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in SHAPE], indexing="ij"))
    grid -= centre.astype(np.float32)[:, None, None, None]
    coordinates = np.tensordot(matrix.astype(np.float32), grid, axes=1)
    coordinates += middle[:3].astype(np.float32)[:, None, None, None]
    for axis in coordinates:
        axis += 2.5 * smooth_field(rng, SHAPE, (1.0, 1.0, 1.0), correlation_mm=40.0)
    return np.asarray(coordinates, dtype=np.float32)


def _paths(root: Path, number: int) -> dict[str, Path]:
    return {name: root / f"bench-{number:03d}" / f"{name}.nii.gz" for name in SIGNALS}


def _write_files(root: Path, number: int) -> None:
    for path, volume in zip(
        _paths(root, number).values(), make_volumes(number).values(), strict=True
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = volume if number % 2 else np.rint(volume).astype(np.int16)
        write_volume(path, stored, np.array(AFFINE))


def _arrays(root: Path, number: int) -> StudyArrays:
    from anycontrast_datasets.volume import read_volume

    volumes = {name: read_volume(path).array for name, path in _paths(root, number).items()}
    return coded_study(f"bench-{number:03d}", volumes, AFFINE)


def _taken_study(study_id: str, paths: dict[str, Path]) -> StudyArrays:
    """Code the foreground of a study's files on their common grid, padded to whole blocks."""
    from anycontrast_datasets.volume import read_volume

    loaded = {name: read_volume(path) for name, path in paths.items()}
    shapes = {volume.array.shape for volume in loaded.values()}
    if len(shapes) != 1:
        raise StudyError(f"bench: the files of a study must share one grid, found {sorted(shapes)}")
    (shape,) = shapes
    padding = [(0, -n % BLOCK_VOX) for n in shape]
    volumes = {
        name: np.pad(v.array * foreground_mask(v.array, v.spacing_mm), padding)
        for name, v in loaded.items()
    }
    affine = next(iter(loaded.values())).affine
    return coded_study(study_id, volumes, tuple(tuple(map(float, row)) for row in affine))
