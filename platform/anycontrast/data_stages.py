"""The stages that look at or hand on a data set: report, croissant, zarr, withdraw.

Like `stages`: each takes the run's configuration and returns a small JSON result.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast.log import progress

if TYPE_CHECKING:
    from anycontrast.training.config import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The page that says what is in a data set."""

    out: str | None = None
    """HTML file to write; None means `<run>/report/dataset.html`, or `report.html` beside a
    manifest that is named instead of a run."""
    min_cell: int | None = None
    """Fewest subjects behind a count that is shown; None means 10, and 1 for phantom data."""
    montage: bool = True
    """Show slices, of volumes without a face; a page for publication may need to go without."""

    def __post_init__(self) -> None:
        if self.min_cell is not None and self.min_cell < 1:
            raise ValueError(f"report.min_cell must be >= 1, got {self.min_cell}; use 10")


@dataclass(frozen=True, kw_only=True)
class CroissantConfig:
    """The description of a data set that catalogues and search engines read."""

    out: str | None = None
    """File to write; None means `<run>/manifest/croissant.json`."""
    name: str = ""
    """Of the data set; blank takes the name of the run."""
    licence: str | None = None
    """SPDX identifier, e.g. `CC-BY-4.0`."""
    description: str = ""
    """One paragraph; blank makes one of the counts."""
    version: str = "1.0.0"
    """Of the data set."""
    cite_as: str = ""
    """How to cite it."""
    url: str = ""
    """Its home page."""
    date_published: str = ""
    """ISO date."""
    base_url: str = ""
    """What precedes the names of the files, ending with `/`; blank for relative names."""


def report(config: "Config", manifest: Path | None = None) -> dict[str, Any]:
    """Write the report of a run's data, or of a manifest that is named.

    Args:
        config: Of the run; of a named manifest only the section `report` counts.
        manifest: Folder of a manifest, or `manifest.parquet` itself.

    Raises:
        ManifestError: there is no usable manifest.
    """
    from anycontrast.shards import shards_location
    from anycontrast_datasets.report import MIN_CELL, write_report

    shards, synthetic = None, False
    if manifest is None:
        manifest, out = config.paths.manifest, config.paths.report / "dataset.html"
        synthetic = config.scan.source == "phantom"
        if config.store.location is not None or (config.paths.shards / "dataset.json").is_file():
            shards = shards_location(config)
    else:
        manifest = manifest.parent if manifest.is_file() else manifest
        out = manifest / "report.html"
    min_cell = config.report.min_cell or (1 if synthetic else MIN_CELL)
    out = out if config.report.out is None else Path(config.report.out)
    result = write_report(
        manifest,
        out,
        shards=shards,
        min_cell=min_cell,
        montage=config.report.montage,
        synthetic=synthetic,
    )
    logger.info("report of the data set in %s", out)
    return result


def withdraw(config: "Config", subject: str) -> dict[str, Any]:
    """Remove a subject from the run's manifest and shards, for good.

    Args:
        config: Of the run.
        subject: Pseudonym, or id in the source.

    Raises:
        ManifestError: there is no such subject.
        ShardError: another process writes the shards.
    """
    from anycontrast_datasets.withdraw import withdraw_subject

    summary = withdraw_subject(*_of_subject(config, subject), **_with_checkpoints(config))
    if config.paths.zarr.is_dir():
        if (config.paths.shards / "dataset.json").is_file():
            zarr(config)
        else:
            logger.warning(
                "the Zarr store in %s still holds the subject: run `anycontrast shard`, then "
                "`anycontrast zarr`",
                config.paths.zarr,
            )
    left = [path for path in config.paths.report.glob("*") if path.suffix in {".html", ".png"}]
    if left:
        logger.warning(
            "pictures and counts of before the withdrawal are still in %s; make them again or "
            "remove them",
            config.paths.report,
        )
    return asdict(summary)


def which_models(config: "Config", subject: str) -> dict[str, Any]:
    """Name the checkpoints of the run that were trained with a subject.

    Args:
        config: Of the run.
        subject: Pseudonym, or id in the source.

    Raises:
        ManifestError: there is and was no such subject.
    """
    from anycontrast_datasets import withdraw as withdrawal

    found = withdrawal.which_models(*_of_subject(config, subject), **_with_checkpoints(config))
    return asdict(found)


def _of_subject(config: "Config", subject: str) -> tuple[Path, Path, str]:
    return config.paths.manifest, config.paths.shards, subject


def _with_checkpoints(config: "Config") -> dict[str, Any]:
    key = config.scan.pseudonym_key_file
    folders = (config.paths.pretrain, config.paths.finetune)
    return {"checkpoints_dirs": folders, "key_file": None if key is None else Path(key)}


def plan(config: "Config") -> tuple[dict[str, Any], str]:
    """Work out what pretraining on the run's manifest will need, as numbers and as text.

    Raises:
        ManifestError: there is no usable manifest, or nothing to serve.
    """
    from anycontrast.plan_text import render
    from anycontrast.planning import run_plan

    result = run_plan(config, config.plan)
    return result, render(result)


def croissant(config: "Config") -> dict[str, Any]:
    """Describe the run's manifest, and its shards if there are any, in Croissant.

    Raises:
        ManifestError: there is no usable manifest.
        ShardError: the shards are of another manifest.
    """
    from anycontrast_datasets.croissant import export_croissant

    wanted = config.croissant
    has_shards = (config.paths.shards / "dataset.json").is_file()
    out = config.paths.manifest / "croissant.json" if wanted.out is None else Path(wanted.out)
    written = export_croissant(
        config.paths.manifest,
        config.paths.shards if has_shards else None,
        out,
        name=wanted.name or config.name,
        licence=wanted.licence,
        description=wanted.description,
        version=wanted.version,
        cite_as=wanted.cite_as,
        url=wanted.url,
        date_published=wanted.date_published,
        base_url=wanted.base_url,
    )
    return {"croissant": str(written)}


def zarr(config: "Config") -> dict[str, Any]:
    """Copy the prepared studies into a Zarr store, for viewers, crops and other tools.

    Raises:
        ShardError: there are no shards, they are of another manifest than the run's, or another
            process writes the folder.
    """
    from anycontrast.shards import check_manifest, open_shards, shards_location
    from anycontrast_datasets.store.reader import describe_store
    from anycontrast_datasets.store.zarr_writer import write_zarr_store

    check_manifest(config)
    store = open_shards(config)
    made_from = describe_store(shards_location(config)).get("manifest_fingerprint", "")
    with progress("writing zarr", "studies") as on_progress:
        return write_zarr_store(
            store,
            config.paths.zarr,
            config.zarr,
            manifest_fingerprint=str(made_from),
            on_progress=on_progress,
        )
