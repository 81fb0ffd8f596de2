"""Which codec and which chunk shape, by measurement: `anycontrast bench codecs`.

Volumes as int16 codes, 12 bits and as fine as their noise deserves: what is left of their bytes,
how fast they are compressed and read again, and what the coarser codes cost beside the noise. Noisy
ones made from tissue maps, and published skull-stripped ones on the frame they came in, when they
are at hand.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from anycontrast.bench.chunks import chunk_rows, chunk_table
from anycontrast.bench.studies import bench_studies
from anycontrast.bench.timing import alternate, markdown_table
from anycontrast_datasets.foreground import foreground_mask
from anycontrast_datasets.intensity import CODES_PER_NOISE, encode, noise_sigma
from anycontrast_datasets.store.codec import BLOCK_BYTES
from anycontrast_datasets.store.codec import encode as encode_frame

logger = logging.getLogger(__name__)

Codes = npt.NDArray[np.int16]
Source = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]
CODECS: tuple[tuple[str, tuple[str, int, int, int] | None], ...] = (
    ("raw int16", None),
    ("blosc lz4-5, byte shuffle", ("lz4", 5, 1, BLOCK_BYTES)),
    ("blosc lz4hc-5, byte shuffle", ("lz4hc", 5, 1, BLOCK_BYTES)),
    ("blosc lz4hc-5, blocks of 256 KiB", ("lz4hc", 5, 1, 2**18)),
    ("blosc lz4hc-5, blocks of 2 MiB", ("lz4hc", 5, 1, 2**21)),
    ("blosc lz4hc-9, byte shuffle", ("lz4hc", 9, 1, BLOCK_BYTES)),
    ("blosc zstd-1, byte shuffle", ("zstd", 1, 1, BLOCK_BYTES)),
    ("blosc zstd-3, byte shuffle", ("zstd", 3, 1, BLOCK_BYTES)),
    ("blosc zstd-5, byte shuffle", ("zstd", 5, 1, BLOCK_BYTES)),
    ("blosc zstd-5, blocks of 256 KiB", ("zstd", 5, 1, 2**18)),
    ("blosc zstd-9, byte shuffle", ("zstd", 9, 1, BLOCK_BYTES)),
    ("blosc zstd-5, bit shuffle", ("zstd", 5, 2, BLOCK_BYTES)),
    ("blosc zstd-5, no shuffle", ("zstd", 5, 0, BLOCK_BYTES)),
)
"""Name -> compressor, level, shuffle and block size of blosc."""
CODINGS: dict[str, float | None] = {
    "12 bits": None,
    "noise / 32": 32.0,
    f"noise / {CODES_PER_NOISE:g}": CODES_PER_NOISE,
    "noise / 8": 8.0,
}
"""Name -> steps per standard deviation of the noise."""
TABLED = ("12 bits", f"noise / {CODES_PER_NOISE:g}")
"""Codings of which every codec is measured; of the others, what they cost."""
REAL = {
    "openms_cross": ("openms_cross/patient19", ("T1", "T1POST", "T2", "FLAIR")),
    "cstar": ("cstar_stroke", ("T1", "T2", "FLAIR")),
}


@dataclass(frozen=True, kw_only=True)
class CodecsBenchConfig:
    """What is measured, and where."""

    folder: str = "runs/bench"
    """Keeps the studies between runs; stores are written there and removed."""
    num_studies: int = 2
    rounds: int = 5
    chunk_vox: tuple[int, ...] = (0, 96, 80, 64, 48, 32)
    """Longest sides of a chunk to try; 0 is the whole volume."""
    real: str = "../shared/real_mri"
    """Folder of published skull-stripped studies; left out if it is not there."""

    def __post_init__(self) -> None:
        if self.num_studies < 1 or self.rounds < 1:
            raise ValueError(
                f"num_studies and rounds: must be at least 1, got {self.num_studies} and "
                f"{self.rounds}"
            )


def run(config: CodecsBenchConfig) -> dict[str, Any]:
    """Measure; returns the tables as numbers and as Markdown.

    Raises:
        ManifestError: If nilearn, whose tissue maps the studies are made from, is not installed.
    """
    folder = Path(config.folder).resolve()
    made = bench_studies(folder, config.num_studies)
    sets = {"noisy": [path for study in made.files for path in study.values()]}
    sets |= _real_files(Path(config.real))
    sources = {name: [_source(path) for path in paths] for name, paths in sets.items()}
    coded = {
        name: {coding: _coded(volumes, steps) for coding, steps in CODINGS.items()}
        for name, volumes in sources.items()
    }
    codecs = {
        coding: {
            name: _codec_rows(codings[coding][0], config.rounds) for name, codings in coded.items()
        }
        for coding in TABLED
    }
    costs = {
        name: {coding: _cost(*volumes) for coding, volumes in codings.items()}
        for name, codings in coded.items()
    }
    chunks = chunk_rows(made.store, folder / "codecs-zarr", config.chunk_vox, config.rounds)
    tables = {coding: _table(rows) for coding, rows in codecs.items()}
    return {
        "codecs": codecs,
        "codings": costs,
        "chunks": chunks,
        "markdown": {**tables, "codings": _cost_table(costs), "chunks": chunk_table(chunks)},
    }


def real_ratios(folder: Path) -> dict[str, float]:
    """Return how much smaller the codes of published skull-stripped studies get, as shipped.

    Each study by itself, and all together as `skull_stripped`.
    """
    totals = {}
    for name, paths in _real_files(folder).items():
        codes, _ = _coded([_source(path) for path in paths], CODES_PER_NOISE)
        totals[name] = (sum(c.nbytes for c in codes), sum(len(encode_frame(c)) for c in codes))
    ratios = {name: raw / small for name, (raw, small) in totals.items()}
    if ratios:
        raws, smalls = zip(*totals.values(), strict=True)
        ratios["skull_stripped"] = sum(raws) / sum(smalls)
    return ratios


def _codec_rows(volumes: list[Codes], rounds: int) -> dict[str, dict[str, float]]:
    """Compress every volume by every codec; numbers per volume, ratios against raw int16."""
    from numcodecs import blosc

    raw = sum(codes.nbytes for codes in volumes)
    outs = [np.empty_like(codes) for codes in volumes]
    encoders = {name: _encoder(options) for name, options in CODECS}
    frames = {name: [encoder(codes) for codes in volumes] for name, encoder in encoders.items()}

    def decoder(name: str, is_raw: bool) -> Callable[[int], object]:
        def decode(number: int) -> None:
            if is_raw:
                outs[number].reshape(-1)[:] = np.frombuffer(frames[name][number], np.int16)
            else:
                blosc.decompress(frames[name][number], outs[number])

        return decode

    decoders = {name: decoder(name, options is None) for name, options in CODECS}
    decoded = alternate(decoders, len(volumes), rounds)
    encoded = alternate(
        {name: _on_items(encoder, volumes) for name, encoder in encoders.items()},
        num_items=min(len(volumes), 2),
        rounds=1,
    )
    mean_mb = raw / len(volumes) / 1e6
    return {
        name: {
            "ratio": raw / sum(len(frame) for frame in frames[name]),
            "encode_mb_per_s": mean_mb / (encoded[name].cpu_ms / 1e3),
            "decode_ms": decoded[name].cpu_ms,
            "decode_gb_per_s": mean_mb / decoded[name].cpu_ms,
        }
        for name, _ in CODECS
    }


def _encoder(options: tuple[str, int, int, int] | None) -> Callable[[Codes], bytes]:
    from numcodecs import blosc

    if options is None:
        return lambda codes: codes.tobytes()
    name, level, shuffle, block = options
    return lambda codes: cast(bytes, blosc.compress(codes, name.encode(), level, shuffle, block))


def _on_items(function: Callable[[Codes], object], items: list[Codes]) -> Callable[[int], object]:
    return lambda number: function(items[number])


def _real_files(folder: Path) -> dict[str, list[Path]]:
    """Find the published skull-stripped studies that are at hand."""
    found = {}
    for name, (place, files) in REAL.items():
        paths = [folder / place / f"{file}.nii.gz" for file in files]
        if all(path.is_file() for path in paths):
            found[name] = paths
        else:
            logger.warning("%s is not in %s: left out of the codec table", name, folder)
    return found


def _source(path: Path) -> Source:
    """Read a volume and its foreground, on the frame it came in."""
    from anycontrast_datasets.volume import read_volume

    loaded = read_volume(path)
    return loaded.array, foreground_mask(loaded.array, loaded.spacing_mm)


def _coded(volumes: list[Source], codes_per_noise: float | None) -> tuple[list[Codes], list[float]]:
    """Code volumes; returns the codes, and the rms error of each over its noise.

    Voxels that saturate are left out of the error.
    """
    codes, errors = [], []
    for array, mask in volumes:
        coded = encode(array, mask, "T1w", codes_per_noise)
        kept = mask & (coded.codes < coded.codes.max())
        off = coded.codes[kept] * coded.scale + coded.offset - array[kept]
        codes.append(coded.codes)
        errors.append(float(np.sqrt(np.mean(off**2))) / noise_sigma(array, mask))
    return codes, errors


def _cost(volumes: list[Codes], errors: list[float]) -> dict[str, float]:
    """Sum up a coding by the shipped codec: MB of a volume, ratio, largest code, worst error."""
    num_bytes = sum(len(encode_frame(codes)) for codes in volumes)
    return {
        "mb_per_volume": num_bytes / len(volumes) / 1e6,
        "ratio": sum(codes.nbytes for codes in volumes) / num_bytes,
        "max_code": float(max(codes.max() for codes in volumes)),
        "rms_error_over_noise": max(errors),
    }


def _table(codecs: dict[str, dict[str, dict[str, float]]]) -> str:
    header = ["codec"]
    for name in codecs:
        header += [f"{name}: ratio", "encode MB/s", "decode ms"]
    rows = []
    for codec, _ in CODECS:
        row = [codec]
        for values in codecs.values():
            row.append(f"{values[codec]['ratio']:.2f}")
            row.append(f"{values[codec]['encode_mb_per_s']:.0f}")
            row.append(f"{values[codec]['decode_ms']:.1f}")
        rows.append(row)
    return markdown_table(header, rows)


def _cost_table(costs: dict[str, dict[str, dict[str, float]]]) -> str:
    header = ["step of the codes"]
    for name in costs:
        header += [f"{name}: MB a volume", "ratio", "largest code", "rms error / noise"]
    rows = []
    for coding in CODINGS:
        row = [coding]
        for values in costs.values():
            cost = values[coding]
            row += [f"{cost['mb_per_volume']:.2f}", f"{cost['ratio']:.2f}"]
            row += [f"{cost['max_code']:.0f}", f"{cost['rms_error_over_noise']:.2%}"]
        rows.append(row)
    return markdown_table(header, rows)
