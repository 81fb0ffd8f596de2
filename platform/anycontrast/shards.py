"""Where the shards of a run are read from: its own folder, or an address with a cache."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from anycontrast_datasets.store.cache import CacheConfig

if TYPE_CHECKING:
    from anycontrast.training.config import Config
    from anycontrast_datasets.store.reader import StudyStore


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Which prepared studies training and evaluation read."""

    location: str | None = None
    """Folder or address (`s3://`, `gs://`, `https://`) of shards or of a Zarr store; None means
    the run's own `shards/`."""
    cache: CacheConfig = field(default_factory=CacheConfig)


def open_shards(config: "Config") -> "StudyStore":
    """Open the prepared studies of a run, wherever they lie.

    Raises:
        ShardError: the location is not allowed, or there is no whole store of a known kind.
    """
    from anycontrast_datasets.store.reader import open_store

    return open_store(shards_location(config), cache=config.store.cache)


def shards_location(config: "Config") -> Path | str:
    """Return the folder or address that the prepared studies of a run are read from."""
    return config.paths.shards if config.store.location is None else config.store.location
