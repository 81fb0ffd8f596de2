"""The stages of a run, one function each: what the command line and the recipes both call.

Every stage reads what the stage before it left under `runs/<name>/`, writes its own folder and
returns a small JSON result. Run again with nothing changed, it uses what is there and says so: scan
and evaluate by a stamp over everything that decides their content, shard and export by comparing
what they would write, training by resuming from its newest checkpoint.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast import __version__
from anycontrast.log import progress
from anycontrast.shards import check_manifest
from anycontrast.training.config import Config, ConfigError

if TYPE_CHECKING:
    from anycontrast_datasets.shard import ShardSummary

logger = logging.getLogger(__name__)

_STAMP = "stage.json"
_REPORT_FILES = tuple(f"dice_by_subset.{kind}" for kind in ("csv", "md", "png", "json"))


def scan(config: Config) -> dict[str, Any]:
    """Find the studies of the source and write the manifest and the ledger.

    A source that is missing or empty leaves an earlier manifest in place, since it may only be
    unmounted; `shard` then warns that the last scan did not finish.

    Raises:
        ManifestError: nothing to scan, or nothing accepted (the ledger says why).
    """
    from anycontrast_datasets.scan import run_scan
    from anycontrast_datasets.withdraw_rows import WITHDRAWN_NAME

    out = config.paths.manifest
    is_phantom = config.scan.source == "phantom"
    root = config.scan.root or (str(config.paths.source) if is_phantom else None)
    scanned = replace(config.scan, root=root)

    def key() -> str:
        named = (scanned.table, scanned.mapping, str(out / WITHDRAWN_NAME))
        return _key("scan", asdict(scanned), _listing(root), [_digest(path) for path in named])

    def make() -> None:
        unit = "studies, then files" if is_phantom else "files"
        with progress("scanning", unit) as on_progress:
            summary = run_scan(scanned, out, on_progress=on_progress)
        logger.info("manifest in %s: %s", out, summary)

    # The phantom is written by the scan itself, so its files are those after it.
    _once(out, key, lambda: _is_manifest_whole(out), make, stamp_after=is_phantom)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    counts = {k: summary[k] for k in ("studies", "subjects", "inputs", "accepted", "refused")}
    return {
        "manifest": str(out),
        **counts,
        "refused_by_code": summary["by_code"],
        "ledger": str(out / "private" / "ledger.csv"),
    }


def shard(config: Config) -> dict[str, Any]:
    """Prepare every study of the manifest once and write the volume store.

    Shards of an earlier run are kept after every byte of them was checked, so running this again
    mends whatever was lost or damaged.

    Raises:
        ManifestError: there is no usable manifest.
        ShardError: no study could be prepared, or another process writes the folder.
    """
    from anycontrast_datasets.shard import run_shard

    out, manifest = config.paths.shards, config.paths.manifest
    if (manifest / "manifest.parquet").is_file() and not (manifest / _STAMP).is_file():
        logger.warning(
            "the last scan into %s did not finish, sharding what an earlier one found; run "
            "`anycontrast scan` until it succeeds",
            manifest,
        )
    with progress("sharding", "studies") as on_progress:
        summary = run_shard(manifest, out, config.prepare, config.shard, on_progress=on_progress)
    logger.info("%s", _shard_sentence(summary, out))
    return {
        "shards": str(out),
        "studies": summary.num_studies,
        "sharded": summary.num_sharded,
        "refused": summary.num_refused,
        "refused_by_code": summary.refused_by_code,
        "fingerprint": summary.fingerprint,
    }


def ensure_shards(config: Config) -> None:
    """Make the phantom's shards when there are none; other sources are sharded on purpose.

    Raises:
        ConfigError: there are no shards, and their source is not the phantom.
        ShardError: there are shards, of another manifest than the run's.
    """
    if config.store.location is not None or (config.paths.shards / "dataset.json").is_file():
        check_manifest(config)
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
    result = launch(config)
    metrics = config.paths.pretrain / "metrics.jsonl"
    if result.get("loss") is not None and metrics.is_file():
        from anycontrast.evaluation.panels import loss_curve

        result = {**result, "curve": str(config.paths.report / "loss.png")}
        loss_curve(metrics, config.paths.report / "loss.png")
        if panels := sorted((config.paths.pretrain / "panels").glob("*.png")):
            result["reconstruction"] = str(config.paths.report / "reconstruction.png")
            shutil.copyfile(panels[-1], result["reconstruction"])
    return result


def finetune(config: Config) -> dict[str, Any]:
    """Finetune a segmenter from the pretrained encoder, or from scratch on request."""
    from anycontrast.training.finetune import run_finetune

    if config.finetune.from_scratch:
        # Otherwise the patch is the pretraining checkpoint's, and is checked against that.
        _check_window(config)
    ensure_shards(config)
    return run_finetune(config)


def evaluate(config: Config) -> dict[str, Any]:
    """Dice of every finetuned model on every contrast subset, into `report/`.

    Raises:
        CheckpointError: nothing was finetuned, or its checkpoint is damaged.
        ManifestError: no labelled study in the split.
        ShardError: there are no shards, or they are of another manifest than the run's.
    """
    from anycontrast.evaluation.evaluate import find_finetuned, run_evaluate
    from anycontrast.shards import shards_location
    from anycontrast_datasets.store.reader import describe_store

    out = config.paths.report
    models = find_finetuned(config.paths.finetune)
    if models:
        check_manifest(config)
    data = describe_store(shards_location(config)) if models else None
    checkpoints = [_digest(str(path / "manifest.json")) for path in models.values()]
    key = _key("evaluate", asdict(config.evaluate), data, checkpoints)
    _once(
        out,
        lambda: key,
        lambda: all((out / name).is_file() for name in _REPORT_FILES),
        lambda: run_evaluate(config),
    )
    summary = json.loads((out / "dice_by_subset.json").read_text(encoding="utf-8"))
    widest = max((len(row["contrasts"]) for row in summary["rows"]), default=0)
    return {
        "report": str(out / "dice_by_subset.md"),
        "plot": str(out / "dice_by_subset.png"),
        "studies": summary["num_studies"],
        "subsets": len({row["subset"] for row in summary["rows"]}),
        "dice_of_largest_subset": {
            f"{row['variant']}, {row['region']}, {row['subset']}": row["dice_mean"]
            for row in summary["rows"]
            if len(row["contrasts"]) == widest
        },
    }


def export(config: Config) -> dict[str, Any]:
    """Write the releases of this run (encoder, and the finetuned segmenter) into `release/`.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    from anycontrast.release.export import run_export

    return {"releases": [str(path) for path in run_export(config)]}


def _check_window(config: Config) -> None:
    """Refuse a window that is not whole patches before anything is loaded."""
    window, patch = config.finetune.segmenter.window_vox, config.model.patch_vox
    if any(w % p for w, p in zip(window, patch, strict=True)):
        raise ConfigError(
            "finetune.segmenter.window_vox must be whole patches of model.patch_vox "
            f"{tuple(patch)}, got {tuple(window)}; choose multiples of it"
        )


def _shard_sentence(summary: "ShardSummary", out: Path) -> str:
    refused = f", {summary.num_refused} refused {summary.refused_by_code}"
    kept = f"reused {summary.num_reused} of {summary.num_shards} shards, every byte as written"
    return (
        f"{kept if summary.num_reused else f'wrote {summary.num_shards} shards'} in {out}: "
        f"{summary.num_sharded} studies{refused if summary.num_refused else ''}, "
        f"{summary.num_bytes / 2**20:.1f} MiB"
    )


def _is_manifest_whole(folder: Path) -> bool:
    from anycontrast_datasets.manifest import read_locations, read_manifest
    from anycontrast_datasets.study import ManifestError

    try:
        read_manifest(folder / "manifest.parquet")
        read_locations(folder)
    except ManifestError as error:
        logger.warning("scanning again: %s", error)
        return False
    return all((folder / name).is_file() for name in ("summary.json", "private/ledger.csv"))


def _key(*parts: object) -> str:
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: str | None) -> str | None:
    if path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _listing(root: str | None) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file under `root`: has the source changed?"""
    if root is None or not (folder := Path(root).expanduser()).is_dir():
        return []
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _is_stamped(folder: Path, key: str) -> bool:
    stamp = folder / _STAMP
    try:
        return bool(json.loads(stamp.read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _once(
    folder: Path,
    key: Callable[[], str],
    is_whole: Callable[[], bool],
    make: Callable[[], object],
    *,
    stamp_after: bool = False,
) -> None:
    """Make `folder` unless it was made with the same key and is still whole."""
    before = key()
    if _is_stamped(folder, before) and is_whole():
        logger.info("reused %s: nothing that decides it has changed", folder)
        return
    (folder / _STAMP).unlink(missing_ok=True)
    make()
    temporary = folder / f"{_STAMP}.tmp-{os.getpid()}"
    temporary.write_text(
        json.dumps({"key": key() if stamp_after else before, "version": __version__}),
        encoding="utf-8",
    )
    temporary.replace(folder / _STAMP)
