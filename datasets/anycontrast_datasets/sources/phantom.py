"""The embedded dataset: multi-site studies with missing contrasts and lesions, from nothing.

In: a `PhantomConfig`. Out: a BIDS folder of NIfTI files, JSON sidecars and lesion masks, which is
then scanned like any other. Anatomy from `phantom_anatomy`, signals from `phantom_physics`, lesions
from `phantom_lesions`, images from `phantom_scanner`. Costs about 0.4 s of CPU a study at 3 mm.

```text
<root>/
  dataset_description.json
  sub-0001/ses-1/anat/sub-0001_ses-1_FLAIR.nii.gz   and .json; T1w, T2w, GRE, SWI
  sub-0001/ses-1/anat/sub-0001_ses-1_ce-gadolinium_T1w.nii.gz
  sub-0001/ses-1/dwi/sub-0001_ses-1_trace.nii.gz    trace-weighted DWI; ADC in 1e-6 mm^2/s
  derivatives/phantom/sub-0001/ses-1/sub-0001_ses-1_desc-lesion_mask.nii.gz
  phantom.json                                      configuration and file list, written last
```
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from anycontrast_datasets.ledger import Refusal
from anycontrast_datasets.sources import bids
from anycontrast_datasets.sources.claims import SourceOptions
from anycontrast_datasets.sources.phantom_config import (
    PHANTOM_CONTRASTS,
    PhantomConfig,
    StudyPlan,
    plan_study,
)
from anycontrast_datasets.sources.phantom_scanner import ScannedImage, scan_study
from anycontrast_datasets.study import ManifestError, Study
from anycontrast_datasets.volume import write_volume

__all__ = [
    "PHANTOM_CONTRASTS",
    "PhantomConfig",
    "StudyPlan",
    "label_path",
    "plan_study",
    "scan",
    "volume_path",
    "write_phantom",
]

logger = logging.getLogger(__name__)

_RECORD = "phantom.json"
_DESCRIPTION = "dataset_description.json"
# Raise when the same configuration gives other voxels than before: old folders are then remade.
_FORMAT = 2
_NAMES = {"T1wCE": "ce-gadolinium_T1w", "DWI": "trace"}


def volume_path(plan: StudyPlan, contrast: str) -> str:
    """Path of one volume relative to the dataset's root."""
    folder = "dwi" if contrast in ("DWI", "ADC") else "anat"
    name = f"{plan.stem}_{_NAMES.get(contrast, contrast)}.nii.gz"
    return f"sub-{plan.subject:04d}/ses-{plan.session}/{folder}/{name}"


def label_path(plan: StudyPlan) -> str:
    """Path of the lesion mask relative to the dataset's root."""
    folder = f"derivatives/phantom/sub-{plan.subject:04d}/ses-{plan.session}"
    return f"{folder}/{plan.stem}_desc-lesion_mask.nii.gz"


def scan(root: Path, options: SourceOptions) -> Iterator[Study | Refusal]:
    """Yield the studies of a written phantom: a BIDS scan.

    Raises:
        ManifestError: the folder is missing or cannot be listed.
    """
    yield from bids.scan(root, options)


def write_phantom(
    root: Path,
    config: PhantomConfig,
    *,
    num_threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the dataset, or leave it alone when it is already there and of this configuration.

    Args:
        root: folder of the dataset, made when missing. Files of an earlier phantom in it are
            replaced; files of anyone else are refused.
        config: what to make. The same configuration gives the same bytes.
        num_threads: studies made at a time; does not change what is written.
        on_progress: called with (studies done, studies in all).

    Raises:
        ManifestError: `root` holds NIfTI files that no phantom run wrote, or nilearn is missing.
    """
    plans = [plan_study(config, index) for index in range(config.num_studies)]
    recorded = _read_record(root)
    if recorded is not None and _is_current(root, recorded, config):
        logger.info("phantom: reusing %d studies made earlier of this configuration", len(plans))
        if on_progress is not None:
            on_progress(len(plans), len(plans))
        return
    _clear(root, recorded, {path for plan in plans for path in _planned_files(plan)})
    root.mkdir(parents=True, exist_ok=True)
    files = [_write_json(root, _DESCRIPTION, _description())]
    # Threads, because the work is in numpy, scipy and zlib, which release the interpreter lock.
    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as executor:
        pending = [executor.submit(_write_study, root, config, plan) for plan in plans]
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                files += future.result()
                if on_progress is not None:
                    on_progress(done, len(plans))
        finally:
            executor.shutdown(cancel_futures=True)
    sizes = {name: (root / name).stat().st_size for name in sorted(files)}
    _write_json(root, _RECORD, {**_identity(config), "files": sizes})
    logger.info("phantom: made %d studies in %d files", len(plans), len(sizes))


def _write_study(root: Path, config: PhantomConfig, plan: StudyPlan) -> list[str]:
    """Make and write one study; return the paths written, relative to the root."""
    study = scan_study(config, plan)
    written = []
    for contrast, image in study.images.items():
        written += _write_image(root, volume_path(plan, contrast), image)
    return written + _write_image(root, label_path(plan), study.label)


def _write_image(root: Path, name: str, image: ScannedImage) -> list[str]:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, image.array, image.affine)
    return [name, _write_json(root, _sidecar_name(name), image.sidecar)]


def _sidecar_name(name: str) -> str:
    return name.removesuffix(".nii.gz") + ".json"


def _write_json(root: Path, name: str, content: Mapping[str, object]) -> str:
    """Write whole or not at all; return the name."""
    path = root / name
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    return name


def _description() -> dict[str, object]:
    return {
        "Name": "anycontrast phantom",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "GeneratedBy": [{"Name": "anycontrast", "Description": "Simulated; no person was scanned"}],
    }


def _planned_files(plan: StudyPlan) -> list[str]:
    """All files of a study, sidecars included."""
    images = [volume_path(plan, contrast) for contrast in plan.contrasts] + [label_path(plan)]
    return images + [_sidecar_name(name) for name in images]


def _identity(config: PhantomConfig) -> dict[str, object]:
    """What the bytes depend on, as JSON gives it back."""
    content = json.loads(json.dumps(asdict(config), sort_keys=True))
    text = json.dumps([_FORMAT, content], sort_keys=True)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return {"format": _FORMAT, "config": content, "config_sha256": digest}


def _read_record(root: Path) -> dict[str, object] | None:
    """Return what `phantom.json` says, None when there is none."""
    path = root / _RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(
            f"phantom: {path} is not JSON ({error}); delete the folder to have it made again"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise ManifestError(
            f"phantom: {path} lists no files, so it was not written here; choose another folder"
        )
    return record


def _is_current(root: Path, record: Mapping[str, object], config: PhantomConfig) -> bool:
    """Whether the record is of this configuration and all its files have their size."""
    if record.get("config_sha256") != _identity(config)["config_sha256"]:
        logger.info("phantom: the configuration has changed, making the studies again")
        return False
    for name, size in _files(record).items():
        path = root / name
        if not path.is_file() or path.stat().st_size != size:
            logger.warning("phantom: %s is missing or cut, making the studies again", name)
            return False
    return True


def _files(record: Mapping[str, object]) -> dict[str, int]:
    files = record["files"]
    assert isinstance(files, dict), "checked when the record was read"
    return files


def _clear(root: Path, record: Mapping[str, object] | None, planned: set[str]) -> None:
    """Remove the record and the files of an earlier configuration; refuse foreign images.

    Files that an interrupted run of this configuration left are overwritten later.
    """
    if not root.is_dir():
        return
    listed = set() if record is None else set(_files(record))
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.nii*") if path.is_file()}
    if foreign := sorted(found - listed - planned):
        raise ManifestError(
            f"phantom: {root} holds {len(foreign)} images that are not of this phantom, e.g. "
            f"{foreign[0]}; choose an empty folder or delete this one"
        )
    (root / _RECORD).unlink(missing_ok=True)
    for name in sorted(listed - planned):
        path = root / name
        # A record is a file anyone can edit: nothing outside the root is ever removed.
        if path.resolve().is_relative_to(root.resolve()):
            path.unlink(missing_ok=True)
