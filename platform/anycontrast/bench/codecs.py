"""Which codec and which chunk shape, by measurement: `anycontrast bench codecs`.

Volumes as int16 codes: what is left of their bytes, how fast they are compressed and read again.
Noisy ones made from tissue maps, and published skull-stripped ones on the frame they came in, when
they are at hand.
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
from anycontrast_datasets.intensity import encode
from anycontrast_datasets.store.codec import BLOCK_BYTES
from anycontrast_datasets.store.codec import encode as encode_frame
from anycontrast_datasets.store.reader import open_store

logger = logging.getLogger(__name__)

Codes = npt.NDArray[np.int16]
CODECS: tuple[tuple[str, tuple[str, int, int, int] | None], ...] = (
    ("raw int16", None),
    ("blosc lz4-5, byte shuffle", ("lz4", 5, 1, BLOCK_BYTES)),
    ("blosc lz4hc-5, byte shuffle", ("lz4hc", 5, 1, BLOCK_BYTES)),
    ("blosc lz4hc-9, byte shuffle", ("lz4hc", 9, 1, BLOCK_BYTES)),
    ("blosc zstd-1, byte shuffle", ("zstd", 1, 1, BLOCK_BYTES)),
    ("blosc zstd-3, byte shuffle", ("zstd", 3, 1, BLOCK_BYTES)),
    ("blosc zstd-5, byte shuffle", ("zstd", 5, 1, BLOCK_BYTES)),
    ("the same, blocks of 256 KiB", ("zstd", 5, 1, 2**18)),
    ("blosc zstd-9, byte shuffle", ("zstd", 9, 1, BLOCK_BYTES)),
    ("blosc zstd-5, bit shuffle", ("zstd", 5, 2, BLOCK_BYTES)),
    ("blosc zstd-5, no shuffle", ("zstd", 5, 0, BLOCK_BYTES)),
)
"""Name -> compressor, level, shuffle and block size of blosc."""
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
    """Measure; returns both tables as numbers and as Markdown.

    Raises:
        ManifestError: If nilearn, whose tissue maps the studies are made from, is not installed.
    """
    folder = Path(config.folder).resolve()
    made = bench_studies(folder, config.num_studies)
    store = open_store(made.store)
    sets = {"noisy": [store.read(n).codes for n in range(config.num_studies)]}
    sets |= {name: [codes] for name, codes in _real_studies(Path(config.real)).items()}
    codecs = {name: _codec_rows(studies, config.rounds) for name, studies in sets.items()}
    chunks = chunk_rows(made.store, folder / "codecs-zarr", config.chunk_vox, config.rounds)
    return {
        "codecs": codecs,
        "chunks": chunks,
        "markdown": {"codecs": _table(codecs), "chunks": chunk_table(chunks)},
    }


def real_ratios(folder: Path) -> dict[str, float]:
    """Return how much smaller zstd-5 makes each published skull-stripped study, and all of them."""
    totals = {
        name: (
            sum(codes.nbytes for codes in study.values()),
            sum(len(encode_frame(codes)) for codes in study.values()),
        )
        for name, study in _real_studies(folder).items()
    }
    ratios = {name: raw / small for name, (raw, small) in totals.items()}
    if ratios:
        raws, smalls = zip(*totals.values(), strict=True)
        ratios["skull_stripped"] = sum(raws) / sum(smalls)
    return ratios


def _codec_rows(studies: list[dict[str, Codes]], rounds: int) -> dict[str, dict[str, float]]:
    """Compress every volume by every codec; numbers per volume, ratios against raw int16."""
    from numcodecs import blosc

    volumes = [codes for study in studies for codes in study.values()]
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


def _real_studies(folder: Path) -> dict[str, dict[str, Codes]]:
    """Code published skull-stripped volumes on the frame they came in."""
    from anycontrast_datasets.volume import read_volume

    found = {}
    for name, (place, files) in REAL.items():
        paths = [folder / place / f"{file}.nii.gz" for file in files]
        if not all(path.is_file() for path in paths):
            logger.warning("%s is not in %s: left out of the codec table", name, folder)
            continue
        study = {}
        for path in paths:
            loaded = read_volume(path)
            mask = foreground_mask(loaded.array, loaded.spacing_mm)
            study[path.stem] = encode(loaded.array, mask, "T1w").codes
        found[name] = study
    return found


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
