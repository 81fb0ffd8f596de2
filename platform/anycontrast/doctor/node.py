"""What one node answers: versions, GPUs, memory, disks and what its storage can do.

`examine` runs on the node itself, in a Ray task or in this process; `confirm` runs on every node
after all have been examined, and reads what the others wrote. Nothing here judges.
"""

import os
import resource
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from anycontrast.training.provenance import Provenance, provenance

_SHARED_MEMORY = Path("/dev/shm")
_PROBE_BYTES = 1 << 20
_IPC_LOCK = 1 << 14
"""The capability of a process to lock any amount of memory, in the mask of Linux."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    total_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Space:
    """A file system."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class NodeAnswer:
    """What a node said of itself."""

    node: str
    """Name or address it is known by."""
    ray: str
    """Version of Ray; empty where it is not installed."""
    code: Provenance
    gpus: tuple[Gpu, ...]
    shared_memory: Space | None
    """None where there is no /dev/shm."""
    disks: dict[str, Space] = field(default_factory=dict)
    """By what the folder is for."""
    storage: dict[str, str] = field(default_factory=dict)
    """By folder: what could not be done in it, empty where all could."""
    uses_rdma: bool = False
    """Whether NCCL is told to use RDMA there."""
    lockable_bytes: int | None = None
    """Memory that a process may lock; None where there is no limit."""


@dataclass(frozen=True)
class Question:
    """What every node is asked."""

    probe: str
    """Name of the probe, the same on all nodes."""
    folders: tuple[str, ...]
    """Folders that all nodes write: the run folder, and Ray's own where it is one."""
    disks: dict[str, str] = field(default_factory=dict)
    """Folders whose free space counts, by what they are for."""


def new_probe() -> str:
    """Return a name that no other doctor uses at the moment."""
    return f".doctor-{secrets.token_hex(6)}"


def examine(question: Question, node: str) -> NodeAnswer:
    """Answer on the node this runs on; `node` is how it is called in messages."""
    return NodeAnswer(
        node=node,
        ray=_version("ray"),
        code=provenance(),
        gpus=gpus(),
        shared_memory=_space(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None,
        disks={use: _space(_existing(Path(folder))) for use, folder in question.disks.items()},
        storage={
            folder: try_storage(Path(folder), question.probe, node) for folder in question.folders
        },
        uses_rdma=os.environ.get("NCCL_NET") == "IB",
        lockable_bytes=lockable_bytes(),
    )


def confirm(question: Question, nodes: list[str]) -> dict[str, str]:
    """Read in each folder what every node wrote; returns by folder what is missing, or nothing."""
    found = {}
    for folder in question.folders:
        lacking = [node for node in nodes if not _holds(Path(folder), question.probe, node)]
        found[folder] = f"does not see what {', '.join(lacking)} wrote" if lacking else ""
    return found


def clean_up(question: Question) -> None:
    """Remove what the probes wrote."""
    for folder in question.folders:
        shutil.rmtree(Path(folder) / question.probe, ignore_errors=True)


def clock_s() -> float:
    """Return this node's Unix time."""
    return time.time()


def try_storage(folder: Path, probe: str, node: str) -> str:
    """Do to a folder what checkpoints and locks do; returns what went wrong, or nothing.

    Writes and fsyncs a file, reads it back, renames it over another, creates one that must not
    exist, and fsyncs the folder.
    """
    here = folder / probe
    content = _content(node)
    what = "making a folder"
    try:
        here.mkdir(parents=True, exist_ok=True)
        what = "writing"
        draft, final = here / f"{node}.draft", here / node
        _write(draft, content + os.urandom(_PROBE_BYTES))
        what = "reading back"
        if draft.stat().st_size != len(content) + _PROBE_BYTES:
            return "reading back: the file has another size than was written"
        what = "renaming over an existing file"
        _write(final, b"older")
        _write(draft, content)
        draft.replace(final)
        if final.read_bytes() != content or draft.exists():
            return "renaming over an existing file: the older content is still there"
        what = "creating a file that must not exist"
        try:
            final.open("x").close()
        except FileExistsError:
            pass
        else:
            return "creating a file that must not exist: an existing one was taken"
        what = "flushing the folder"
        handle = os.open(here, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        return f"{what}: {error.strerror or error}"
    return ""


def lockable_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Return how much memory this process may lock; None where there is no limit."""
    lines = status.read_text().splitlines() if status.is_file() else []  # macOS has no /proc.
    effective = [line for line in lines if line.startswith("CapEff:")]
    if effective and int(effective[0].split()[1], 16) & _IPC_LOCK:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def gpus() -> tuple[Gpu, ...]:
    """Ask the driver, since Ray hides GPUs from tasks that did not ask for one."""
    query = "--query-gpu=name,memory.total,memory.used"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rsplit(",", 2) for line in done.stdout.splitlines() if line.strip()]
    return tuple(Gpu(name, _mebibytes(total), _mebibytes(used)) for name, total, used in rows)


def host() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def _mebibytes(text: str) -> int:
    # Some devices share their memory with the host and say "[N/A]".
    return int(text) << 20 if text.strip().isdigit() else 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _space(folder: Path) -> Space:
    usage = shutil.disk_usage(folder)
    return Space(usage.total, usage.free)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _content(node: str) -> bytes:
    return f"written by {node}\n".encode()


def _holds(folder: Path, probe: str, node: str) -> bool:
    try:
        return (folder / probe / node).read_bytes() == _content(node)
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
