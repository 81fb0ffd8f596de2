"""Convert one stack of DICOM files to a NIfTI file that says nothing but shape, place and voxels.

In: a `Stack`. Out: the path of its volume in the private folder of the manifest, or a refusal.
dcm2niix turns pixels into voxels, in a folder of its own under neutral names, without a sidecar,
with limits on time, memory and disk; the result is read with the checks of any volume and written
again with a header from scratch. A volume is named by the content of its files, so the next scan
finds it again.

Source: dcm2niix (Li et al. 2016, doi 10.1016/j.jneumeth.2016.03.001).
"""

import contextlib
import hashlib
import logging
import re
import resource
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.files import sha256_file, write_atomically
from anycontrast_datasets.sources.dicom_series import Stack
from anycontrast_datasets.study import ManifestError, VolumeError
from anycontrast_datasets.volume import LoadedVolume, read_volume, write_volume

logger = logging.getLogger(__name__)

CONVERTED_NAME = "converted"
TIMEOUT_S = 600.0
"""For one stack; a thousand slices take a few seconds."""
# Another number makes every volume anew: raise it when the same files give other voxels.
_RECIPE = "1"
_WORK_PREFIX = ".work-"
_NAME_CHARS = 32
_MAX_OFFSET_VOX = 0.25
_MEMORY_BYTES = 8 * 2**30
# No sidecar, no compression, a neutral name, one output per folder, no defaults file.
_OPTIONS = ("-b", "n", "-z", "n", "-f", "v", "-m", "y", "-x", "i", "-w", "1", "-g", "i", "-d", "0")
_NAME = re.compile(r"[a-z0-9_-]+")
# What the converter may say of its own accord -> what the ledger says; its lines name files.
_COMPLAINTS = (
    ("transfer syntax", "its compression is not supported"),
    ("no valid dicom", "the converter found no image in the files"),
    ("unable to decode", "its pixels cannot be decoded"),
    ("out of memory", "the converter ran out of memory"),
    ("not enough memory", "the converter ran out of memory"),
    ("interslice distance varies", "slices are not evenly spaced"),
)


@dataclass(frozen=True)
class Converter:
    """Where the converter is, and where volumes go."""

    program: Path
    version: str
    folder: Path
    """`converted` in the private folder; one sub-folder per study."""
    max_bytes: int


def make_converter(work_dir: Path, max_bytes: int) -> Converter:
    """Find the converter and make its folder, readable by the owner only.

    Raises:
        ManifestError: the converter is not installed or does not start.
    """
    folder = work_dir.resolve() / CONVERTED_NAME
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    for left in folder.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    program = _program()
    return Converter(program, _version(program), folder, max_bytes)


def convert(stack: Stack, study_id: str, root: Path, converter: Converter) -> Path:
    """Return the volume of a stack, made now or by an earlier scan.

    Args:
        stack: whole and of one contrast.
        study_id: pseudonym, the name of the sub-folder.
        root: scanned folder.
        converter: from `make_converter`.

    Raises:
        VolumeError: see `code`; the message names no file and quotes no header.
        ManifestError: the folder cannot be written to.
    """
    try:
        return _convert(stack, study_id, root, converter)
    except OSError as error:
        raise ManifestError(
            f"converting DICOM into {converter.folder}: cannot write ({error.strerror}); make room "
            "or correct the permissions, then scan again: what is converted is kept"
        ) from error


def _convert(stack: Stack, study_id: str, root: Path, converter: Converter) -> Path:
    assert _NAME.fullmatch(study_id), "folders are named by pseudonyms only"
    target = converter.folder / study_id / f"{_content_name(stack, converter)}.nii.gz"
    if _is_whole(target):
        return target
    target.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=converter.folder) as work:
        made = _run(stack, root, Path(work), converter)
        try:
            loaded = read_volume(made, max_bytes=converter.max_bytes)
        except VolumeError as error:
            raise VolumeError(
                str(error).replace(str(made), "the converted series"), code=error.code
            ) from None
    _check_places(stack, loaded)
    write_volume(target, _smallest(loaded.array), loaded.affine)
    target.chmod(0o600)
    write_atomically(_digest_path(target), sha256_file(target).encode(), mode=0o600)
    return target


def prune(converter: Converter, used: set[Path]) -> None:
    """Remove volumes of earlier scans without a series in this one: it changed, or went."""
    for study in [path for path in converter.folder.iterdir() if path.is_dir()]:
        for path in [p for p in study.iterdir() if p.name.endswith(".nii.gz") and p not in used]:
            _digest_path(path).unlink(missing_ok=True)
            path.unlink()
        with contextlib.suppress(OSError):
            study.rmdir()


def _check_places(stack: Stack, loaded: LoadedVolume) -> None:
    """Compare the volume with what the headers say of every slice, without the converter.

    The first pixel of each slice must be the same corner of the volume, one slice further along.
    """
    first = stack.instances[0]
    if "MOSAIC" in first.image_type:
        return
    frames = [frame for instance in stack.instances for frame in instance.frames]
    lps_mm = np.array([frame.position_mm for frame in frames], dtype=np.float64)
    ras_mm = np.column_stack([lps_mm * (-1, -1, 1), np.ones(len(frames))])
    exact = (ras_mm @ np.linalg.inv(loaded.affine).T)[:, :3]
    index = np.rint(exact).astype(np.int64)
    axis = int(np.ptp(index, axis=0).argmax())
    across = [a for a in range(3) if a != axis]
    corner = index[0, across]
    size = np.array(loaded.array.shape)[across]
    fits = (
        np.abs(exact - index).max() < _MAX_OFFSET_VOX
        and np.array_equal(np.sort(index[:, axis]), np.arange(loaded.array.shape[axis]))
        and bool(np.all(index[:, across] == corner))
        and bool(np.all((corner == 0) | (corner == size - 1)))
        and sorted(size.tolist()) == sorted((first.rows, first.columns))
    )
    if not fits:
        raise _failure("the volume made of it does not lie where its slices do")


def _content_name(stack: Stack, converter: Converter) -> str:
    content = hashlib.sha256(f"{_RECIPE} {converter.version}".encode())
    for digest in sorted(i.header_sha256 + i.pixels_sha256 for i in stack.instances):
        content.update(digest.encode())
    return content.hexdigest()[:_NAME_CHARS]


def _digest_path(target: Path) -> Path:
    return target.with_name(target.name.replace(".nii.gz", ".sha256"))


def _is_whole(target: Path) -> bool:
    """Say if a volume of an earlier scan is there as it was written."""
    try:
        return _digest_path(target).read_text(encoding="ascii") == sha256_file(target)
    except (OSError, UnicodeDecodeError):
        return False


def _run(stack: Stack, root: Path, work: Path, converter: Converter) -> Path:
    """Run the converter on links with neutral names; return the one file it made."""
    source, made = work / "in", work / "out"
    source.mkdir()
    made.mkdir()
    for index, location in enumerate(stack.locations):
        (source / f"{index:06d}.dcm").symlink_to((root / location).resolve())
    command = [str(converter.program), *_OPTIONS, "-o", str(made), str(source)]
    said, code = _call(command, work, converter.max_bytes)
    # Overlays come out as further images, and may be what somebody wrote into the picture.
    volumes = [path for path in sorted(made.glob("*.nii")) if "_ROI" not in path.name]
    if code != 0 or not volumes:
        raise _failure(_explain(said, code))
    if len(volumes) > 1:
        raise _failure(f"the converter made {len(volumes)} volumes of one stack of slices")
    return volumes[0]


def _call(command: list[str], home: Path, max_bytes: int) -> tuple[str, int]:
    environment = {"HOME": str(home), "TMPDIR": str(home), "LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        command, cwd=home, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process:
        _limit(process.pid, max_bytes)
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise _failure(f"the converter took more than {TIMEOUT_S:g} s") from None
    return said[-(2**16) :].decode("ascii", "replace").lower(), process.returncode


def _limit(pid: int, max_bytes: int) -> None:
    limits = (
        (resource.RLIMIT_AS, max(_MEMORY_BYTES, 3 * max_bytes)),
        (resource.RLIMIT_FSIZE, 2 * max_bytes),
        (resource.RLIMIT_CORE, 0),
    )
    with contextlib.suppress(ProcessLookupError):
        for what, most in limits:
            resource.prlimit(pid, what, (most, most))


def _explain(said: str, code: int) -> str:
    """Say why nothing came out, in words of ours: the converter's own may quote the header."""
    if code < 0:
        return f"the converter was stopped by signal {-code}"
    known = [reason for words, reason in _COMPLAINTS if words in said]
    return known[0] if known else f"the converter gave up (exit status {code})"


def _failure(reason: str) -> VolumeError:
    return VolumeError(reason, code="conversion_failed")


def _smallest(array: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Return int16 where that holds every value exactly, else the float32 array."""
    low, high = float(array.min()), float(array.max())
    if low >= -(2**15) and high < 2**15 and np.array_equal(array, np.rint(array)):
        return array.astype(np.int16)
    return array


@cache
def _program() -> Path:
    try:
        import dcm2niix
    except ImportError as error:
        raise ManifestError(
            "converting DICOM needs the package dcm2niix, which is not installed; install "
            "anycontrast with its training extra"
        ) from error
    return Path(dcm2niix.bin)


@cache
def _version(program: Path) -> str:
    """Return the version line of the converter: other versions may give other voxels."""
    try:
        done = subprocess.run(
            [str(program), "--version"], capture_output=True, timeout=60, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ManifestError(
            f"converting DICOM: {program} does not start ({type(error).__name__}); install the "
            "package dcm2niix again"
        ) from error
    return next(iter(re.findall(r"v\d[\w.]+", done.stdout.decode("ascii", "replace"))), "unknown")
