"""DICOM: series of any vendor in any folders, found by their headers, converted and inspected.

In: a folder of DICOM files, classic or enhanced, of any names and nesting. Subject, session and
series come from PatientID, StudyInstanceUID and SeriesInstanceUID; all become keyed pseudonyms.
Every file ends in a study or in the ledger; one converted volume stands for many files. What of a
header is read, and what becomes of it: `dicom_tags.KEPT_TAGS`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from anycontrast_datasets.contrast_votes import guess_from_description
from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions
from anycontrast_datasets.sources.dicom_convert import Converter, convert, make_converter, prune
from anycontrast_datasets.sources.dicom_header import Instance, read_instance
from anycontrast_datasets.sources.dicom_listing import list_files
from anycontrast_datasets.sources.dicom_series import Stack, find_stacks
from anycontrast_datasets.sources.grouping import build_studies
from anycontrast_datasets.study import ManifestError, Study, VolumeError

# Shares of the work, for the progress: headers, conversion, inspection.
_PHASES = 3


def scan_dicom(
    root: Path, options: SourceOptions, work_dir: Path, stands_for: dict[str, tuple[str, ...]]
) -> Iterator[Study | Refusal]:
    """Yield the studies of a folder of DICOM files and a refusal for every file not in one.

    Args:
        root: scanned folder.
        options: naming, contrasts to keep, limits.
        work_dir: private folder of the manifest; volumes go to `converted/` in it.
        stands_for: gets, for the location of each converted volume, the files it was made of.

    Raises:
        ManifestError: the folder is missing or cannot be listed, or the parser or the converter is
            not installed.
    """
    if find_spec("pydicom") is None:
        raise ManifestError(
            f"scanning {root}: reading DICOM needs the package pydicom, which is not installed; "
            "install anycontrast with its training extra"
        )
    locations, refused = list_files(root)
    yield from refused
    progress = _Progress(options.on_progress, len(locations))
    instances: list[Instance] = []
    sidecars: dict[str, dict[str, object]] = {}
    for location in locations:
        read = read_instance(root, location, max_bytes=options.max_bytes)
        progress.add(1)
        if isinstance(read, Refusal):
            yield read
            progress.add(_PHASES - 1)
        else:
            # The slices of a series share one sidecar; a million of their own take gigabytes.
            shared = sidecars.setdefault(repr(read.sidecar), read.sidecar)
            instances.append(replace(read, sidecar=shared))
    stacks: list[Stack] = []
    for found in find_stacks(instances):
        if isinstance(found, Stack):
            stacks.append(found)
        else:
            yield found
            progress.add(_PHASES - 1)
    if stacks:
        yield from _convert_all(stacks, root, options, work_dir, stands_for, progress)


def _convert_all(
    stacks: Sequence[Stack],
    root: Path,
    options: SourceOptions,
    work_dir: Path,
    stands_for: dict[str, tuple[str, ...]],
    progress: "_Progress",
) -> Iterator[Study | Refusal]:
    converter = make_converter(work_dir, options.max_bytes)
    claims: list[FileClaim | Refusal] = []
    executor = ThreadPoolExecutor(max_workers=options.num_threads)
    try:
        pending = [executor.submit(claim_stack, s, root, options, converter) for s in stacks]
        for stack, made in zip(stacks, pending, strict=True):
            claim = made.result()
            stands_for[claim.location] = stack.locations
            claims.append(claim)
            progress.add(len(stack.locations))
    finally:
        executor.shutdown(cancel_futures=True)
    first_files = {location: files[0] for location, files in stands_for.items()}
    for found in build_studies(root, claims, replace(options, on_progress=None)):
        if isinstance(found, Study):
            progress.add(sum(len(stands_for[v.location]) for v in found.volumes))
            yield found
        else:
            files = stands_for.pop(found.location)
            progress.add(len(files))
            reason = _name_series(found.reason, converter.folder, first_files)
            yield from (replace(found, location=file, reason=reason) for file in files)
    prune(converter, {Path(location) for location in first_files})


def _name_series(reason: str, folder: Path, first_files: Mapping[str, str]) -> str:
    """Name the converted volumes in a reason by the first file of their series."""
    paths = re.compile(rf"{re.escape(str(folder))}/[a-z0-9_-]+/[a-z0-9]+\.nii\.gz")
    return paths.sub(lambda match: f"the series of {first_files[match.group()]}", reason)


def claim_stack(
    stack: Stack, root: Path, options: SourceOptions, converter: Converter
) -> FileClaim | Refusal:
    """Convert a stack and say what its headers say; the location is the converted file."""
    first = stack.instances[0]
    identity = options.naming(stack.subject, stack.study_uid)
    study_id = identity.study_id
    if identity.subject_id in options.withdrawn:
        return refuse(first.location, "withdrawn", "the subject has withdrawn", study_id=study_id)
    is_decided = any(location in options.decisions for location in stack.locations)
    code, reason = ("", "") if is_decided else _fault_of_description(first)
    if code:
        return refuse(first.location, code, reason, study_id=study_id)
    try:
        path = convert(stack, study_id, root, converter)
    except VolumeError as error:
        return refuse(first.location, error.code, str(error), study_id=study_id)
    return FileClaim(
        location=str(path),
        subject=stack.subject,
        session=stack.study_uid,
        sidecar=first.sidecar,
        description=first.description,
        site=options.naming.site(*first.site),
        source_files=stack.locations,
    )


def _fault_of_description(first: Instance) -> tuple[str, str]:
    """Return why a series need not be converted; a reason holds known tokens only."""
    guess = guess_from_description(first.description)
    said = "; ".join(guess.evidence)
    if guess.is_phase:
        return "phase_image", f"a phase image ({said})"
    return ("not_trainable", f"not learned from ({said})") if guess.is_derived else ("", "")


class _Progress:
    """Counts files in thirds: header read, series converted, volume inspected."""

    def __init__(self, report: Callable[[int, int], None] | None, num_files: int) -> None:
        self._report = report
        self._num_files = num_files
        self._done = 0

    def add(self, thirds: int) -> None:
        self._done += thirds
        if self._report is not None:
            self._report(self._done // _PHASES, self._num_files)
