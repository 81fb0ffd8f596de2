"""Where the shards of a run are read from, and whether they are those of its manifest."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from anycontrast_datasets.store.byte_source import parse_location
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


def shown_location(config: "Config") -> str:
    """Return where the prepared studies are read from as messages may say it: without secrets."""
    return parse_location(shards_location(config)).shown


def check_manifest(config: "Config") -> None:
    """Check that the run's manifest, if it has one, is the one that its shards were made from.

    After another scan, or a withdrawal, shards that were left as they are hold other studies than
    the manifest lists.

    Raises:
        ManifestError: the manifest is not one that this installation reads.
        ShardError: they do not belong together, or `open_shards` would refuse the shards.
    """
    from anycontrast_datasets.manifest import MANIFEST_NAME, SCHEMA
    from anycontrast_datasets.manifest_file import VerifiedFile
    from anycontrast_datasets.store.reader import describe_store
    from anycontrast_datasets.study import ShardError

    manifest = config.paths.manifest / MANIFEST_NAME
    if not manifest.is_file():
        return
    file = VerifiedFile(manifest, SCHEMA)
    file.check_fingerprint()
    wanted = file.fingerprint
    found = describe_store(shards_location(config)).get("manifest_fingerprint")
    if not found or found == wanted:
        return
    is_own = config.store.location is None
    remedy = (
        "run `anycontrast shard` again (what has not changed is kept)"
        if is_own
        else "copy this run's shards there, or set another `name=` for a run without this manifest"
    )
    raise ShardError(
        f"checking {shown_location(config)}: these shards were made from another manifest "
        f"({str(found)[:16]}) than {manifest} ({wanted[:16]}); {remedy}"
    )
