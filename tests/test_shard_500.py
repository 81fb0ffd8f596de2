"""Five hundred phantom studies: scanned, sharded and accounted for, one by one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from anycontrast_datasets.manifest import read_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, ShardSummary, run_shard
from anycontrast_datasets.sources.phantom_config import PhantomConfig
from anycontrast_datasets.store.reader import open_store

NUM_STUDIES = 500
SPACING_MM = (10.0, 10.0, 10.0)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def shard_phantom(
    folder: Path,
    num_studies: int,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path, ShardSummary]:
    """Scan and shard phantom studies of 10 mm; returns manifest folder, shards, summary."""
    scan = ScanConfig(
        source="phantom",
        dataset="phantom",
        root=str(folder / "source"),
        check_pictures=False,
        phantom=PhantomConfig(num_studies=num_studies, spacing_mm=SPACING_MM),
    )
    manifest, shards = folder / "manifest", folder / "shards"
    run_scan(scan, manifest)
    summary = run_shard(
        manifest,
        shards,
        PrepareConfig(spacing_mm=SPACING_MM, box_multiple_vox=8),
        ShardConfig(studies_per_shard=32),
        on_progress=on_progress,
    )
    return manifest, shards, summary


@pytest.fixture(scope="module")
def phantom_500(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ShardSummary]:
    """The 500 studies, made once for this file. Do not damage them."""
    return shard_phantom(tmp_path_factory.mktemp("phantom"), NUM_STUDIES)


def test_every_study_is_sharded_or_refused(phantom_500: tuple[Path, Path, ShardSummary]) -> None:
    manifest, shards, summary = phantom_500
    store = open_store(shards)
    assert summary.num_studies == NUM_STUDIES
    assert summary.num_sharded + summary.num_refused == NUM_STUDIES
    assert [r.study_id for r in store.records] == [
        study.study_id for study in read_manifest(manifest / "manifest.parquet")
    ]
    assert store.verify() == []
