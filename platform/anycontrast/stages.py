"""The stages of a run, one function each: what the command line and the recipes both call.

Every stage reads what the stage before it left under `runs/<name>/` and writes its own folder.
Scan and shard stamp their folder with a key over everything that decides its content, so running
them again with nothing changed uses what is there and says so; training resumes from its newest
checkpoint by itself.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anycontrast import __version__
from anycontrast.log import progress
from anycontrast.training.config import Config, ConfigError

logger = logging.getLogger(__name__)

_STAMP = "stage.json"


def _key(*parts: object) -> str:
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _listing(root: str | None) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file under `root`: has the source changed?"""
    if root is None or not Path(root).is_dir():
        return []
    files = sorted(p for p in Path(root).rglob("*") if p.is_file())
    return [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _stamped(folder: Path, key: str) -> bool:
    stamp = folder / _STAMP
    return stamp.is_file() and json.loads(stamp.read_text()).get("key") == key


def _stamp(folder: Path, key: str) -> None:
    temporary = folder / f"{_STAMP}.tmp-{os.getpid()}"
    temporary.write_text(json.dumps({"key": key, "version": __version__}))
    temporary.replace(folder / _STAMP)


def _once(folder: Path, key: str, outputs: tuple[str, ...], make: Callable[[], object]) -> None:
    """Make `folder` unless it was made with the same key and its outputs are still there."""
    if _stamped(folder, key) and all((folder / name).is_file() for name in outputs):
        logger.info("reused %s: nothing that decides it has changed", folder)
        return
    (folder / _STAMP).unlink(missing_ok=True)
    make()
    _stamp(folder, key)


def scan(config: Config) -> Path:
    """Find the studies of the source and write the manifest and the ledger; return its folder."""
    from anycontrast_datasets.scan import run_scan

    out = config.paths.manifest
    section = asdict(config.scan)
    if config.scan.source == "phantom" and config.scan.root is None:
        section["root"] = str(config.paths.source)
    table = config.scan.table
    table_bytes = Path(table).read_bytes().hex() if table and Path(table).is_file() else None

    def make() -> None:
        from dataclasses import replace

        with progress("scanning", "files") as on_progress:
            scanned = replace(config.scan, root=section["root"])
            summary = run_scan(scanned, out, on_progress=on_progress)
        logger.info("manifest in %s: %s", out, summary)

    key = _key("scan", section, _listing(config.scan.root), table_bytes)
    _once(out, key, ("manifest.parquet", "summary.json"), make)
    return out


def shard(config: Config) -> Path:
    """Prepare every study of the manifest once and write the volume store; return its folder."""
    from anycontrast_datasets.shard import run_shard

    manifest, out = config.paths.manifest, config.paths.shards
    if not (manifest / "manifest.parquet").is_file():
        raise ConfigError(
            f"shard: no manifest in {manifest}; run `anycontrast scan` with the same name"
        )

    def make() -> None:
        with progress("sharding", "studies") as on_progress:
            summary = run_shard(
                manifest, out, config.prepare, config.shard, on_progress=on_progress
            )
        logger.info("shards in %s: %s", out, summary)

    digest = hashlib.sha256((manifest / "manifest.parquet").read_bytes()).hexdigest()
    key = _key("shard", digest, asdict(config.prepare), asdict(config.shard))
    _once(out, key, ("dataset.json", "index.parquet"), make)
    return out


def ensure_shards(config: Config) -> None:
    """Make the phantom's shards when there are none; other sources are sharded on purpose."""
    if (config.paths.shards / "dataset.json").is_file():
        return
    if config.scan.source != "phantom":
        raise ConfigError(
            f"no shards in {config.paths.shards}; run `anycontrast scan CONFIG` and "
            "`anycontrast shard CONFIG` with the same config first"
        )
    logger.info("no shards in %s: making the embedded phantom studies first", config.paths.shards)
    scan(config)
    shard(config)


def pretrain(config: Config) -> dict[str, Any]:
    """Pretrain, on Ray or in this process as `cluster` says; resumes by itself."""
    from anycontrast.training.cluster import launch

    ensure_shards(config)
    return launch(config)


def finetune(config: Config) -> dict[str, Any]:
    """Finetune a segmenter from the pretrained encoder, or from scratch on request."""
    from anycontrast.training.finetune import run_finetune

    ensure_shards(config)
    return run_finetune(config)


def evaluate(config: Config) -> dict[str, Any]:
    """Dice of every finetuned model on every contrast subset, into `report/`."""
    from anycontrast.evaluation.evaluate import run_evaluate

    return run_evaluate(config)


def export(config: Config) -> list[Path]:
    """Write the releases of this run (encoder, and the finetuned segmenter) into `release/`."""
    from anycontrast.release.export import run_export

    return run_export(config)
