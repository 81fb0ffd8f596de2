"""What several test files build: one complete tiny run, studies of noise, NIfTI files, DICOM, Ray.

The tiny run is every stage a user calls on phantom studies of 8 mm, made once.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from anycontrast.training.config import Config
    from anycontrast_datasets.batch import PackedBatch
    from anycontrast_datasets.study import StudyArrays
    from anycontrast_datasets.volume import LoadedVolume

TINY_RUN = """\
name: tiny
root: {root}
scan:
  source: phantom
  dataset: phantom
  check_pictures: false
  split_fractions: [0.4, 0.3, 0.3]
  split_salt: c
  phantom:
    num_studies: 10
    spacing_mm: [8.0, 8.0, 8.0]
    num_sites: 2
    always: [DWI, ADC]
    keep_probability: {{T1w: 0.6, FLAIR: 0.6}}
    lesion_fraction: 1.0
prepare: {{spacing_mm: [8.0, 8.0, 8.0], box_multiple_vox: 8}}
shard: {{studies_per_shard: 5}}
model: {{preset: tiny, width: 64, num_heads: 1, depth: 4, patch_vox: [8, 8, 8]}}
cluster: {{mode: process}}
pretrain:
  steps: 4
  log_every: 1
  checkpoint_every: 2
  panel_every: -1
  stream: {{studies_per_step: 2}}
  optim: {{warmup_steps: 1}}
finetune:
  steps: 4
  log_every: 1
  checkpoint_every: 4
  panel_every: -1
  studies_per_step: 1
  contrasts: [DWI, ADC]
  max_validation_studies: 1
  overlap: 0.0
  optim: {{warmup_steps: 1}}
  segmenter:
    regions: {{lesion: [1, 2, 3, 4], core: [1, 3]}}
    window_vox: [16, 16, 16]
    feature_size: 4
evaluate: {{contrasts: [DWI, ADC], overlap: 0.0, num_bootstrap: 20, max_studies: 1}}
pull: {{cache: {root}/cache}}
"""


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_tiny_yaml() -> Callable[[Path], Path]:
    """Write the tiny run's config with another `root`; returns the YAML file."""

    def write(folder: Path) -> Path:
        path = folder / "tiny.yaml"
        path.write_text(TINY_RUN.format(root=folder / "runs"))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_yaml(
    tmp_path_factory: pytest.TempPathFactory, write_tiny_yaml: Callable[[Path], Path]
) -> Path:
    """The config file of `tiny_run`."""
    return write_tiny_yaml(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_run(tiny_yaml: Path) -> "Config":
    """A finished run: scan, shard, pretrain, finetune twice, evaluate, export. Do not damage it."""
    from anycontrast import stages
    from anycontrast.training.config import load_config

    config = load_config(tiny_yaml)
    for stage in (stages.scan, stages.shard, stages.pretrain, stages.finetune):
        stage(config)
    stages.finetune(load_config(tiny_yaml, ["finetune.from_scratch=true"]))
    stages.evaluate(config)
    stages.export(config)
    return config


@pytest.fixture
def run_copy(
    tiny_run: object, tiny_yaml: Path, tmp_path: Path, write_tiny_yaml: Callable[[Path], Path]
) -> Path:
    """A copy of the whole tiny run to damage; returns its config file, in `tmp_path`."""
    shutil.copytree(tiny_yaml.parent / "runs", tmp_path / "runs")
    return write_tiny_yaml(tmp_path)


NOISE_PATCH = (4, 2, 6)


@pytest.fixture(scope="session")
def noise_study() -> "Callable[..., StudyArrays]":
    """Make a prepared study of noise; a volume depends on study id and contrast alone."""
    from anycontrast_datasets.contrast import ContrastDescriptor
    from anycontrast_datasets.study import StudyArrays, StudyRecord, VolumeRecord

    def make(
        study_id: str,
        contrasts: tuple[str, ...],
        *,
        grid: tuple[int, int, int] = (3, 4, 2),
        spacing_mm: tuple[float, float, float] = (4.0, 8.0, 3.0),
    ) -> StudyArrays:
        x, y, z = NOISE_PATCH
        shape = (grid[0] * x, grid[1] * y, grid[2] * z)
        codes, volumes = {}, []
        for name in contrasts:
            rng = np.random.default_rng(crc32(f"{study_id} {name}".encode()))
            codes[name] = rng.integers(1, 4000, size=shape).astype(np.int16)
            volumes.append(
                VolumeRecord(
                    contrast=name,
                    scale=0.5,
                    offset=3.0,
                    p0_5=0.0,
                    p99_5=2000.0,
                    mean=1000.0,
                    std=580.0,
                    num_foreground=codes[name].size,
                    occupancy="",
                    source_spacing_mm=spacing_mm,
                    descriptor=ContrastDescriptor(te_s=0.01),
                )
            )
        record = StudyRecord(
            study_id=study_id,
            dataset="noise",
            subject_id=study_id,
            session_id="1",
            split="train",
            shape=shape,
            spacing_mm=spacing_mm,
            affine=((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0)),
            volumes=tuple(volumes),
        )
        return StudyArrays(record, codes)

    return make


@pytest.fixture(scope="session")
def noise_pack() -> "Callable[..., PackedBatch]":
    """Pack whole studies of noise, patch by patch of `NOISE_PATCH`."""
    from anycontrast_datasets.pack import pack_studies

    def pack(*studies: "StudyArrays") -> "PackedBatch":
        return pack_studies(studies, NOISE_PATCH, epochs=[0] * len(studies), drop_empty=False)

    return pack


@pytest.fixture(scope="session")
def token_voxels() -> "Callable[[PackedBatch], Tensor]":
    """Say where in `codes_B` the voxels of every token lie: [T, P], for grids of whole patches."""
    import torch

    from anycontrast_kernels import reference

    def find(batch: "PackedBatch") -> "Tensor":
        return reference.gather_patches(
            torch.arange(len(batch.codes_B)),
            batch.volume_start_V,
            batch.volume_shape_V3,
            batch.flip_V3,
            batch.volume_T,
            batch.grid_T3,
            batch.patch_vox,
        )

    return find


@pytest.fixture
def study_a(noise_study: "Callable[..., StudyArrays]") -> "StudyArrays":
    """Three contrasts on one grid."""
    return noise_study("a", ("T1w", "FLAIR", "ADC"))


@pytest.fixture
def study_b(noise_study: "Callable[..., StudyArrays]") -> "StudyArrays":
    """One contrast, another grid and spacing."""
    return noise_study("b", ("DWI",), grid=(2, 5, 3), spacing_mm=(2.0, 2.0, 5.0))


@pytest.fixture
def study_c(noise_study: "Callable[..., StudyArrays]") -> "StudyArrays":
    """Two contrasts, one of them unknown."""
    return noise_study("c", ("T2w", "unknown"), grid=(4, 1, 2))


@pytest.fixture(scope="session")
def study_of() -> "Callable[..., StudyArrays]":
    """Make a prepared study of given codes, one array per contrast, with plain records."""
    from anycontrast_datasets.study import StudyArrays, StudyRecord, VolumeRecord

    def make(
        codes: dict[str, npt.NDArray[np.int16]],
        study_id: str = "study",
        *,
        split: str = "train",
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
        step_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
        label: npt.NDArray[np.uint8] | None = None,
        subject_id: str = "s",
        mean: float = 2000.0,
        std: float = 1000.0,
        occupancy: str = "",
    ) -> StudyArrays:
        shape = next(iter(codes.values())).shape
        volumes = tuple(
            VolumeRecord(
                contrast=contrast,
                scale=1.0,
                offset=0.0,
                p0_5=0.0,
                p99_5=4095.0,
                mean=mean,
                std=std,
                num_foreground=int(np.prod(shape)),
                occupancy=occupancy,
                source_spacing_mm=(1.0, 1.0, 1.0),
            )
            for contrast in codes
        )
        x, y, z = step_mm
        record = StudyRecord(
            study_id=study_id,
            dataset="test",
            subject_id=subject_id,
            session_id="1",
            split=split,
            shape=shape,
            spacing_mm=spacing_mm,
            affine=((x, 0, 0, 0), (0, y, 0, 0), (0, 0, z, 0), (0, 0, 0, 1)),
            volumes=volumes,
            has_label=label is not None,
        )
        return StudyArrays(record=record, codes=codes, label=label)

    return make


@pytest.fixture(scope="session")
def memory_store(study_of: "Callable[..., StudyArrays]") -> Callable[..., Any]:
    """Make a store of tiny studies in memory: s000, s001, ... of three sizes, some damaged."""
    from dataclasses import replace

    from anycontrast_datasets.intensity import pack_occupancy
    from anycontrast_datasets.store.partial import crop_arrays
    from anycontrast_datasets.store.slots import slot_array
    from anycontrast_datasets.study import ShardError, StudyArrays

    class MemoryStore:
        def __init__(self, studies: "list[StudyArrays]", damaged: dict[str, str]) -> None:
            self.studies = studies
            self.records = tuple(study.record for study in studies)
            self.fingerprint = f"memory-{len(studies)}"
            self.damaged = damaged
            self.reads: list[str] = []

        def read(
            self, index: int, *, contrasts: Any = None, label: bool = False, out: Any = None
        ) -> StudyArrays:
            study = self.studies[index]
            self.reads.append(study.record.study_id)
            names = study.record.contrasts if contrasts is None else tuple(contrasts)
            member = self.damaged.get(study.record.study_id)
            if member in names:
                raise ShardError(
                    f"shard memory-0.tar, study {study.record.study_id}, member {member}: xxh3 "
                    "must be 1, found 2"
                )
            kept = tuple(v for v in study.record.volumes if v.contrast in names)
            codes = {v.contrast: study.codes[v.contrast] for v in kept}
            if out is not None:
                slots = {name: slot_array(out, name, array.shape) for name, array in codes.items()}
                for name, array in codes.items():
                    slots[name][...] = array
                codes = slots
            return StudyArrays(replace(study.record, volumes=kept), codes, study.label)

        def read_crop(self, index: int, start: Any, size: Any, **options: Any) -> StudyArrays:
            return crop_arrays(self.read(index, **options), start, size)

        def verify(self) -> list[str]:
            return sorted(self.damaged)

    def make(
        num_studies: int,
        *,
        contrasts: Any = (("T1w",), ("T1w", "FLAIR")),
        datasets: Any = ("a",),
        damaged: dict[str, str] | None = None,
    ) -> MemoryStore:
        studies = []
        for number in range(num_studies):
            rng = np.random.default_rng(number)
            shape = (8, 8, 8 + 8 * (number % 3))
            names = contrasts[number % len(contrasts)]
            codes = {name: rng.integers(1, 4000, shape).astype(np.int16) for name in names}
            occupancy = pack_occupancy(next(iter(codes.values())))
            study = study_of(codes, f"s{number:03d}", occupancy=occupancy)
            record = replace(study.record, dataset=datasets[number % len(datasets)])
            studies.append(replace(study, record=record))
        return MemoryStore(studies, damaged or {})

    return make


@pytest.fixture
def nifti_affine() -> npt.NDArray[np.float64]:
    """Of another spacing on every axis, x from right to left."""
    return np.array([[-1.1, 0, 0, 40], [0, 0.9, 0, -30], [0, 0, 2.5, -20], [0, 0, 0, 1.0]])


@pytest.fixture(scope="session")
def nifti_array() -> Callable[..., npt.NDArray[Any]]:
    """Make the voxels [9, 8, 7] of `plain_nifti`, in any type."""

    def make(dtype: str = "int16") -> npt.NDArray[Any]:
        values = np.random.default_rng(7).integers(1, 200, size=(9, 8, 7))
        return values.astype(dtype)

    return make


@pytest.fixture
def plain_nifti(
    tmp_path: Path,
    nifti_array: Callable[..., npt.NDArray[Any]],
    nifti_affine: npt.NDArray[np.float64],
) -> Path:
    """A sound `plain.nii`, to damage."""
    from anycontrast_datasets.volume import write_volume

    path = tmp_path / "plain.nii"
    write_volume(path, nifti_array(), nifti_affine)
    return path


@pytest.fixture(scope="session")
def refusal_code() -> Callable[..., str]:
    """Read a file that must be refused by its name; returns the reason code."""
    from anycontrast_datasets.study import VolumeError
    from anycontrast_datasets.volume import read_volume

    def read(path: Path, **options: int) -> str:
        with pytest.raises(VolumeError) as caught:
            read_volume(path, **options)  # type: ignore[arg-type]
        assert str(path) in str(caught.value)
        assert caught.value.code != VolumeError.code  # each place names its own reason
        return caught.value.code

    return read


@pytest.fixture(scope="session")
def patch_bytes() -> Callable[..., Path]:
    """Overwrite the bytes of a file at an offset, little-endian; returns the file."""

    def patch(path: Path, offset: int, form: str, *values: float) -> Path:
        content = bytearray(path.read_bytes())
        struct.pack_into("<" + form, content, offset, *values)
        path.write_bytes(content)
        return path

    return patch


@pytest.fixture(scope="session")
def same_volume() -> "Callable[[LoadedVolume, LoadedVolume], bool]":
    """Equal voxels, and no voxel farther away than sform and qform may differ by rounding."""
    from anycontrast_datasets.volume import same_grid

    def same(one: "LoadedVolume", two: "LoadedVolume") -> bool:
        return np.array_equal(one.array, two.array) and same_grid(
            one.array.shape, one.affine, two.array.shape, two.affine, tolerance_mm=0.04
        )

    return same


@pytest.fixture(scope="session")
def dicom_head() -> Callable[..., Any]:
    """`dicom_head(index, **tags)`: header and pixels of one slice of a T1w series of 24 slices.

    32 x 32 pixels of 6 mm, slices 6 mm apart, an ellipsoid with a darker core.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    x, y, z = np.ogrid[-1:1:32j, -1:1:32j, -1:1:24j]
    radius = np.sqrt((x / 0.8) ** 2 + (y / 0.9) ** 2 + (z / 0.95) ** 2)
    voxels = ((radius < 1) * (700 + 300 * x + 200 * (radius > 0.5))).astype("<u2")

    def make(index: int, *, study: int = 1, series: int = 1, **tags: object) -> Dataset:
        slice_ = Dataset()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_.SOPClassUID, slice_.Modality = MRImageStorage, "MR"
        slice_.PatientID, slice_.PatientName = "0042", "Doe^Jane"
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID = f"1.2.{study}", f"1.2.{study}.{series}"
        slice_.SOPInstanceUID = f"1.2.{study}.{series}.{index}"
        slice_.SeriesNumber, slice_.InstanceNumber = series, index + 1
        slice_.SeriesDescription, slice_.ImageType = "t1_mprage", ["ORIGINAL", "PRIMARY", "M"]
        slice_.Manufacturer, slice_.MagneticFieldStrength = "SIEMENS", "3"
        slice_.ScanningSequence, slice_.MRAcquisitionType = ["GR", "IR"], "3D"
        slice_.EchoTime, slice_.RepetitionTime, slice_.InversionTime = "2.5", "1900", "900"
        slice_.FlipAngle, slice_.SliceThickness, slice_.PixelSpacing = "9", "6", ["6", "6"]
        slice_.ImagePositionPatient = ["-93", "-93", str(-69 + 6 * index)]
        slice_.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        slice_.Rows = slice_.Columns = 32
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 12, 11
        slice_.PixelRepresentation = 0
        slice_.PixelData = voxels[:, :, index % 24].T.tobytes()
        for keyword, value in tags.items():
            setattr(slice_, keyword, value)
        slice_.file_meta.MediaStorageSOPClassUID = slice_.SOPClassUID
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        return slice_

    return make


@pytest.fixture(scope="session")
def write_dicom(dicom_head: Callable[..., Any]) -> Callable[..., list[Path]]:
    """`write_dicom(folder, slices=range(24), **tags)`: files of one series, `IM0000` and so on."""

    def write(folder: Path, slices: Any = range(24), **tags: Any) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"IM{index:04d}" for index in slices]
        for index, path in zip(slices, paths, strict=True):
            dicom_head(index, **tags).save_as(path, enforce_file_format=True)
        return paths

    return write


class RayNodes:
    """A Ray cluster on this machine that disturbs no other: own ports, folders, home and token.

    Every node has an address of its own, so that ranks count them as machines. Nodes and jobs run
    a copy of the code: other code on a worker than in the driver is refused, and someone may be
    editing.
    """

    bin = Path(sys.executable).parent

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder, self.code = folder, folder / "code"
        (folder / "home").mkdir()
        for name in ("platform", "kernels", "datasets", "recipes"):
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(Path(__file__).parents[1] / name, self.code / name, ignore=skip)
        self.token = secrets.token_hex(32)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "HOME": str(folder / "home"),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            # Else nodes on loopback addresses are refused.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            # A number goes stale after two intervals, and those of nodes come every five seconds.
            "RAY_metrics_report_interval_ms": "3000",
            "PYTHONPATH": ":".join(str(self.code / n) for n in ("platform", "kernels", "datasets")),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        self.port, self.dashboard_port = self._free_port(), self._free_port()
        self.address = f"http://127.0.0.1:{self.dashboard_port}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.metrics_ports: list[int] = []
        self.jobs: list[subprocess.Popen[str]] = []

    def start(self, *, num_cpus: int = 4, env: dict[str, str] | None = None) -> int:
        """Start a node and wait until it is there; the first is the head. Returns its number."""
        number = len(self.nodes)
        self.metrics_ports.append(self._free_port())
        command = [str(self.bin / "ray"), "start", "--block", "--disable-usage-stats"]
        command += [f"--num-cpus={num_cpus}", f"--metrics-export-port={self.metrics_ports[-1]}"]
        command += [f"--dashboard-agent-listen-port={self._free_port()}"]
        command += [f"--node-ip-address=127.0.0.{number + 1}", "--object-store-memory=100000000"]
        if number == 0:
            command += ["--head", f"--port={self.port}", f"--temp-dir={self.folder}/r"]
            command += [f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1"]
            command += [f"--ray-client-server-port={self._free_port()}"]
        else:
            command += [f"--address=127.0.0.1:{self.port}"]
        with (self.folder / f"node-{number}.log").open("wb") as log:
            node = subprocess.Popen(
                command,
                env={**self.env, **(env or {})},
                cwd=self.code,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.nodes.append(node)
        self._wait(lambda: number == 0 or self._is_up(number), f"node {number} did not start")
        self._wait(lambda: self.get("/api/version") == 200, "the head did not answer")
        return number

    def get(self, path: str, *, token: str | None = None) -> int:
        """Status code of a request to the head with the token, or with another."""
        bearer = self.token if token is None else token
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        try:
            request = urllib.request.Request(self.address + path, headers=headers)
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code
        except OSError:
            return 0

    def scrape(self, number: int = 0) -> str:
        """What a node's metrics port says, empty while it is not there; it asks for no token."""
        url = f"http://127.0.0.{number + 1}:{self.metrics_ports[number]}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def submit(
        self, *words: str, options: tuple[str, ...] = (), cwd: Path | None = None
    ) -> "subprocess.Popen[str]":
        """Start `ray job submit` of a command."""
        command = [str(self.bin / "ray"), "job", "submit", "--address", self.address, *options]
        job = subprocess.Popen(
            [*command, "--", *words],
            env=self.env,
            cwd=cwd or self.code,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.jobs.append(job)
        return job

    def run(self, *words: str, timeout_s: float = 240, **options: Any) -> tuple[int, str]:
        """Submit a job and wait for its end: exit code and what it printed."""
        job = self.submit(*words, **options)
        text, _ = job.communicate(timeout=timeout_s)
        log = (self.folder / "node-0.log").read_text(errors="replace")
        assert self.nodes[0].poll() is None, f"the head ended: {log[-3000:]}"
        return job.returncode, text

    def kill(self, number: int) -> None:
        """End a node as a power cut would: every process of it, at once."""
        for pid in self._processes(self.nodes[number].pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.nodes[number].wait(10)

    def stop(self) -> None:
        """End what waits for jobs, then all nodes, the head last."""
        for job in self.jobs:
            if job.poll() is None:
                job.kill()
            with job:
                pass
        for number, node in reversed(list(enumerate(self.nodes))):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
                try:
                    node.wait(20)
                except subprocess.TimeoutExpired:
                    self.kill(number)

    def _is_up(self, number: int) -> bool:
        log = (self.folder / f"node-{number}.log").read_text(errors="replace")
        return "Ray runtime started" in log

    def _wait(self, is_true: Callable[[], bool], otherwise: str, timeout_s: float = 90) -> None:
        end_s = time.monotonic() + timeout_s
        while not is_true():
            log = (self.folder / f"node-{len(self.nodes) - 1}.log").read_text(errors="replace")
            is_alive = self.nodes[-1].poll() is None
            assert is_alive and time.monotonic() < end_s, f"{otherwise}: {log[-2000:]}"
            time.sleep(0.2)

    @staticmethod
    def _processes(pid: int) -> list[int]:
        """A process and all below it, as far as they are now."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(stat.parent.name))
        found = [pid]
        for one in found:
            found += children.get(one, [])
        return found

    @staticmethod
    def _free_port() -> int:
        """A port below those that the kernel hands out, so that no connection takes it first."""
        below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        while True:
            port = below - 1 - secrets.randbelow(12000)
            with socket.socket() as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
            return port


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Callable[..., RayNodes]]:
    """Make a `RayNodes`, with further environment variables; all are ended after the file."""
    made: list[RayNodes] = []

    def make(**env: str) -> RayNodes:
        # Socket paths are limited to about 100 characters, so not pytest's own temporary folder.
        made.append(RayNodes(Path(tempfile.mkdtemp(prefix="ac-ray-", dir="/tmp")), **env))
        return made[-1]

    yield make
    for nodes in made:
        nodes.stop()
        shutil.rmtree(nodes.folder, ignore_errors=True)
