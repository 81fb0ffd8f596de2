"""How a Zarr store is laid out: the section `zarr` of a run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ZarrConfig:
    """How studies are laid out in the Zarr store."""

    chunk_vox: int = 80
    """Longest side of an inner chunk; the sides are made to divide the volume. 0 = the volume."""
    num_levels: int = 2
    """Resolutions of every image, each half of the one before: viewers want one or two more."""
    codec: Literal["zstd", "lz4"] = "zstd"
    """Compressor within blosc."""
    level: int = 5
    """Of the codec, 1..9."""
    num_threads: int = 2
    """Studies at a time; the bytes do not depend on it."""

    def __post_init__(self) -> None:
        limits = {"num_levels": (1, 8), "level": (1, 9), "num_threads": (1, 256)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"zarr.{name}: must be {low}..{high}, got {getattr(self, name)}")
        if self.chunk_vox != 0 and not 8 <= self.chunk_vox <= 1024:
            raise ValueError(
                f"zarr.chunk_vox: must be 8..1024, or 0 for whole volumes, got {self.chunk_vox}"
            )
        if self.codec not in ("zstd", "lz4"):
            raise ValueError(f"zarr.codec: must be zstd or lz4, got {self.codec!r}")
