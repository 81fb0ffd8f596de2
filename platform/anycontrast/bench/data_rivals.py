"""The other ways to read studies that `bench data` measures: set up once, then one call a study.

Every way ends with the voxels of all contrasts of a study in memory, in the form its users get:
float32, normalised over the foreground, from the libraries (from MONAI's a random crop, without
which its cache in memory would hand out the same arrays for ever); int16 codes of whole studies
from the stores. What a library caches is made before the clock starts: caches are measured warm.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anycontrast_datasets.store.codec import decode_into
from anycontrast_datasets.store.zarr_metadata import HIERARCHY

Files = Sequence[dict[str, Path]]

CROP_VOX = (96, 96, 96)


@dataclass(frozen=True)
class Rival:
    """One way of reading studies, ready to run."""

    read: Callable[[int], object]
    """Reads study i whole."""
    num_bytes: int
    """On disk for all studies; in memory where nothing else is kept."""


def nibabel_files(files: Files) -> Rival:
    """Open `.nii.gz` files with nibabel and normalise over the foreground."""
    import nibabel

    def read(index: int) -> list[Any]:
        found = []
        for path in files[index].values():
            array = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)  # type: ignore[attr-defined]
            inside = array[array != 0]
            found.append((array - inside.mean()) / inside.std())
        return found

    return Rival(read, _file_bytes(files))


def monai_persistent(files: Files, folder: Path) -> Rival:
    """MONAI's PersistentDataset: transformed once, then one pickle per study from disk."""
    with _quiet():
        from monai.data import PersistentDataset

        dataset = PersistentDataset(_as_items(files), _monai_transform(files), cache_dir=folder)
        for index in range(len(files)):
            dataset[index]
    kept = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    return Rival(lambda index: dataset[index], kept)


def monai_cache(files: Files) -> Rival:
    """MONAI's CacheDataset: transformed once, kept in the memory of the process."""
    with _quiet():
        from monai.data import CacheDataset

        dataset = CacheDataset(
            _as_items(files), _monai_transform(files), num_workers=0, progress=False
        )
    kept = sum(
        dataset._cache[index][name].nbytes for index in range(len(files)) for name in files[0]
    )
    return Rival(lambda index: dataset[index], kept)


def torchio_subjects(files: Files) -> Rival:
    """TorchIO's SubjectsDataset: canonical axes and z-score at every read."""
    with _quiet():
        import torchio

        subjects = [
            torchio.Subject({name: torchio.ScalarImage(path) for name, path in study.items()})
            for study in files
        ]
        transform = torchio.Compose(
            [torchio.ToCanonical(), torchio.ZNormalization(masking_method=_is_nonzero)]
        )
        dataset = torchio.SubjectsDataset(subjects, transform=transform)
    return Rival(lambda index: dataset[index], _file_bytes(files))


def webdataset_tar(store: Path) -> Rival:
    """Webdataset's own reader on our shards, one study after the other, and the same decode."""
    with _quiet():
        import webdataset

        shards = sorted(str(path) for path in store.glob("*.tar"))
        dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    samples = itertools.chain.from_iterable(iter(dataset) for _ in itertools.count())
    shape: tuple[int, ...] | None = None

    def read(index: int) -> list[Any]:
        nonlocal shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            sample = next(samples)
        found = []
        for name, payload in sample.items():
            if name.endswith(".i16b2"):
                shape = shape or _shape_in(sample["study.json"])
                out = np.empty(shape, dtype=np.int16)
                decode_into(payload, out)
                found.append(out)
        return found

    return Rival(read, sum(Path(path).stat().st_size for path in shards))


def zarr_chunks(store: Path, study_ids: Sequence[str], contrasts: Sequence[str]) -> Rival:
    """Read our Zarr store with zarr-python."""
    import zarr

    with _quiet():
        studies = [
            [
                zarr.open_array(str(store / HIERARCHY / study_id / name / "0"), mode="r")
                for name in contrasts
            ]
            for study_id in study_ids
        ]
    return Rival(lambda index: [array[...] for array in studies[index]], folder_bytes(store))


def memcpy(shape: tuple[int, int, int], num_contrasts: int) -> Rival:
    """Copy a study's int16 voxels into memory that was used before: what no reader can beat."""
    source = np.ones((num_contrasts, *shape), dtype=np.int16)
    target = np.zeros_like(source)
    return Rival(lambda index: np.copyto(target, source), 0)


def folder_bytes(folder: Path) -> int:
    """Return the size of everything below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _monai_transform(files: Files) -> Any:
    """Return the usual chain: what is cached, then a random crop of up to 96 x 96 x 96."""
    from monai.transforms import (
        Compose,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        RandSpatialCropd,
    )

    names = list(files[0])
    return Compose(
        [
            LoadImaged(names, image_only=True, ensure_channel_first=True),
            Orientationd(names, axcodes="RAS"),
            NormalizeIntensityd(names, nonzero=True),
            RandSpatialCropd(names, CROP_VOX, random_size=False),
        ]
    )


def _as_items(files: Files) -> list[dict[str, str]]:
    return [{name: str(path) for name, path in study.items()} for study in files]


def _is_nonzero(values: Any) -> Any:
    return values != 0


def _shape_in(record: bytes) -> tuple[int, ...]:
    from anycontrast_datasets.record_json import record_from_json

    return record_from_json(record).shape


def _file_bytes(files: Files) -> int:
    return sum(path.stat().st_size for study in files for path in study.values())


def _quiet() -> AbstractContextManager[Any]:
    """Ignore what libraries warn about while they are imported and set up."""
    return warnings.catch_warnings(action="ignore")
