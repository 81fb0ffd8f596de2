"""Scan: find the studies of a source, check every file, write manifest, summary and ledger.

In: a folder in one of the known layouts. Out, in one folder: `manifest.parquet` (studies, without
paths or original ids), `summary.json` (counts) and `private/` (where the files are, the ledger of
refusals, the mapping table, what was found in each file, the pseudonym key), which must not be
handed on. Every image file of the source is either accepted or in the ledger: inputs = accepted +
refused. The same input gives the same files; files that have not changed are not read again.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.ledger import Refusal, write_ledger
from anycontrast_datasets.manifest import (
    LABEL_KEY,
    MANIFEST_NAME,
    manifest_fingerprint,
    write_locations,
    write_manifest,
)
from anycontrast_datasets.mapping import (
    MAPPING_NAME,
    check_decisions,
    read_decisions,
    write_mapping,
)
from anycontrast_datasets.pseudonym import Naming, PlainNaming, PseudonymNaming, SplitRule, load_key
from anycontrast_datasets.scan_summary import ScanSummary, accepted_files, summarise
from anycontrast_datasets.sources.claims import SourceOptions
from anycontrast_datasets.sources.listing import check_root, list_images
from anycontrast_datasets.sources.phantom_config import PhantomConfig
from anycontrast_datasets.study import ManifestError, Study
from anycontrast_datasets.withdraw_rows import withdrawn_subjects

__all__ = ["ScanConfig", "ScanSummary", "run_scan", "summarise"]

logger = logging.getLogger(__name__)

SUMMARY_NAME = "summary.json"
PRIVATE_NAME = "private"
LEDGER_NAME = "ledger.csv"
KEY_NAME = "pseudonym.key"
CACHE_NAME = "inspected.jsonl"


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """What to scan and how to name what is found."""

    source: Literal["bids", "brats", "folder", "dicom", "phantom"] = "phantom"
    """Layout of the source; `folder` needs a table, `dicom` takes any names, `phantom` makes its
    own data."""
    root: str | None = None
    """Folder to scan; None only for `phantom`, which then writes beside the manifest folder."""
    table: str | None = None
    """CSV or TSV with columns file, subject, session, contrast, label; None unless `folder`."""
    dataset: str = ""
    """Name of the collection; blank takes the name of the source. It goes into the manifest, so it
    must not identify anyone."""
    contrasts: list[str] = field(default_factory=list)
    """Vocabulary names to keep; empty keeps all."""
    unknown_contrast: Literal["refuse", "keep"] = "refuse"
    """What happens to a volume whose contrast cannot be told: ledger, or kept as `unknown`."""
    pseudonym_key_file: str | None = None
    """Secret key for pseudonyms, kept outside the data; None makes one in `private/`."""
    split_salt: str = "anycontrast"
    """Another salt gives another assignment of subjects to splits."""
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of subjects in train, val, test; they sum to 1."""
    check_pictures: bool = True
    """Compare each contrast with its picture, and refuse what is no brain."""
    faces: Literal["refuse", "flag", "allow"] = "refuse"
    """What happens to a structural or gradient-echo volume in which a face shows (or may show):
    ledger, kept with a flag, kept. With any but `refuse` no model of it can be released openly."""
    mapping: str | None = None
    """A mapping table with decisions on contrasts, e.g. the edited `private/mapping.csv` of an
    earlier scan; None applies none."""
    rescan: Literal["changed", "all"] = "changed"
    """`changed` reads only files that are new or have another size or time since the last scan;
    `all` reads every file."""
    max_bytes: int = 2 * 2**30
    """Largest decoded size of one file."""
    num_threads: int = 2
    """Files read at a time; each holds one volume in memory."""
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    """Only for `phantom`."""

    @property
    def dataset_name(self) -> str:
        """What the manifest calls the collection."""
        return self.dataset or self.source

    def __post_init__(self) -> None:
        for name in self.contrasts:
            contrast_id(name)
        if min(self.split_fractions) < 0 or abs(sum(self.split_fractions) - 1) > 1e-6:
            raise ValueError(
                f"scan.split_fractions must be >= 0 and sum to 1, got {self.split_fractions}"
            )
        for name in ("max_bytes", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"scan.{name} must be at least 1, got {getattr(self, name)}")
        if self.source == "folder" and self.table is None:
            raise ValueError(
                "scan.table must name a CSV or TSV file for source=folder (columns file, subject, "
                "session, contrast, label), got None"
            )
        if self.source != "folder" and self.table is not None:
            raise ValueError(f"scan.table is read by source=folder only, not by {self.source}")
        if self.source != "phantom" and self.root is None:
            raise ValueError(f"scan.root must name a folder for source={self.source}, got None")


def run_scan(
    config: ScanConfig, out_dir: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> ScanSummary:
    """Scan a source and write manifest, summary and the private tables into `out_dir`.

    A source that is missing or holds no image leaves earlier results as they are: it may only be
    unmounted. One whose every file is refused removes the earlier manifest.

    Args:
        config: What to scan.
        out_dir: Made when missing; earlier results in it are replaced, its key is kept.
        on_progress: Called with (files done, files in all).

    Raises:
        ManifestError: the source is missing or holds no image, the table is wrong, or no file was
            accepted (the ledger is written first).
    """
    from anycontrast_datasets.duplicates import join_duplicates

    root = _root(config, out_dir)
    private = out_dir / PRIVATE_NAME
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    private.chmod(0o700)
    applied, kept = _decisions(config, private)
    studies: list[Study] = []
    refusals: list[Refusal] = []
    stands_for: dict[str, tuple[str, ...]] = {}
    for found in _source(config, root, private, on_progress, stands_for, applied):
        if isinstance(found, Study):
            studies.append(found)
        else:
            refusals.append(found)
    inputs = _inputs(config, root)
    _check_accounted(root, inputs, studies, refusals, stands_for)
    studies = join_duplicates(studies)
    summary = summarise(studies, refusals, stands_for)
    if summary.inputs == 0:
        kind = "file" if config.source == "dicom" else "image file in the folder (.nii, .nii.gz)"
        raise ManifestError(f"scanning {root}: no {kind}; correct scan.root")
    write_ledger(refusals, private / LEDGER_NAME)
    write_mapping(private / MAPPING_NAME, studies, refusals, decisions=kept, stands_for=stands_for)
    if not studies:
        (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
        raise ManifestError(
            f"scanning {root}: none of {summary.inputs} files was accepted: {summary.by_code}; "
            f"the reasons are in {private / LEDGER_NAME}"
        )
    _write(studies, summary, root, out_dir)
    return summary


def _decisions(config: ScanConfig, private: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the decisions to apply, and those to keep in the table that is written anew."""
    written = private / MAPPING_NAME
    earlier = read_decisions(written) if written.is_file() else {}
    if config.mapping is None:
        if earlier:
            logger.warning(
                "%d decisions in the mapping table are not applied; set scan.mapping to apply them",
                len(earlier),
            )
        return {}, earlier
    applied = read_decisions(Path(config.mapping).expanduser())
    return applied, {**earlier, **applied}


def _inputs(config: ScanConfig, root: Path) -> Sequence[str]:
    if config.source != "dicom":
        return list_images(root)
    from anycontrast_datasets.sources.dicom_listing import list_files

    files, links = list_files(root)
    return [*files, *(link.location for link in links)]


def _check_accounted(
    root: Path,
    inputs: Sequence[str],
    studies: Sequence[Study],
    refusals: Sequence[Refusal],
    stands_for: Mapping[str, Sequence[str]],
) -> None:
    """Every input file is in a study or in the ledger, and in one of them only."""
    accounted = accepted_files(studies, stands_for)
    accounted += [refusal.location for refusal in refusals]
    twice = [name for name, count in Counter(accounted).items() if count > 1]
    assert not twice, f"files accounted for more than once: {twice[:3]}"
    if lost := sorted(set(inputs) - set(accounted)):
        raise ManifestError(
            f"scanning {root}: every image file must be accounted for, found {len(lost)} that are "
            f"not, e.g. {lost[0]}; did the folder change meanwhile? scan again"
        )


def _root(config: ScanConfig, out_dir: Path) -> Path:
    if config.root is None:
        return (out_dir.parent / "source").resolve()
    root = Path(config.root).expanduser().resolve()
    if config.source != "phantom":
        check_root(root)
    return root


def _source(
    config: ScanConfig,
    root: Path,
    private: Path,
    on_progress: Callable[[int, int], None] | None,
    stands_for: dict[str, tuple[str, ...]],
    decisions: Mapping[str, str],
) -> Iterator[Study | Refusal]:
    # Inside, so that loading a configuration loads neither nibabel nor the phantom.
    from anycontrast_datasets.sources import bids, brats, dicom, folder, phantom

    options = SourceOptions(
        dataset=config.dataset_name,
        naming=_naming(config, private),
        contrasts=tuple(config.contrasts),
        unknown_contrast=config.unknown_contrast,
        check_pictures=config.check_pictures,
        max_bytes=config.max_bytes,
        num_threads=config.num_threads,
        faces=config.faces,
        is_synthetic=config.source == "phantom",
        decisions=decisions,
        withdrawn=withdrawn_subjects(private.parent),
        cache_file=private / CACHE_NAME,
        reuse_outcomes=config.rescan == "changed",
        on_progress=on_progress,
    )
    if decisions and config.source != "phantom":
        assert config.mapping is not None, "decisions come from the configured mapping"
        check_decisions(decisions, _inputs(config, root), Path(config.mapping))
    if config.source == "folder":
        assert config.table is not None, "ScanConfig checks that a folder source has a table"
        return folder.scan(root, options, Path(config.table).expanduser())
    if config.source == "brats":
        return brats.scan(root, options)
    if config.source == "dicom":
        return dicom.scan_dicom(root, options, private, stands_for)
    if config.source == "phantom":
        phantom.write_phantom(
            root, config.phantom, num_threads=config.num_threads, on_progress=on_progress
        )
        return phantom.scan(root, options)
    return bids.scan(root, options)


def _naming(config: ScanConfig, private: Path) -> Naming:
    split = SplitRule(config.dataset_name, config.split_salt, config.split_fractions)
    if config.source == "phantom":
        return PlainNaming(config.dataset_name, split)
    given = config.pseudonym_key_file
    key = load_key(Path(given).expanduser() if given else None, private / KEY_NAME)
    return PseudonymNaming(key, config.dataset_name, split)


def _write(studies: Sequence[Study], summary: ScanSummary, root: Path, out_dir: Path) -> None:
    manifest = out_dir / MANIFEST_NAME
    write_manifest(studies, manifest)
    write_locations(_locations(studies, root), out_dir, fingerprint=manifest_fingerprint(manifest))
    text = json.dumps(asdict(summary), indent=2) + "\n"
    write_atomically(out_dir / SUMMARY_NAME, text.encode())


def _locations(studies: Sequence[Study], root: Path) -> Mapping[tuple[str, str], Path]:
    volumes = {
        (study.study_id, volume.contrast): root / volume.location
        for study in studies
        for volume in study.volumes
    }
    labels = {
        (study.study_id, LABEL_KEY): root / study.label.location
        for study in studies
        if study.label is not None
    }
    return volumes | labels
