"""Five hundred phantom studies: scanned, sharded, streamed and accounted for, one by one.

Run as a script, this file is a reader that is killed in the middle of its work.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.audit import combine_states
from anycontrast_datasets.manifest import read_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, ShardSummary, run_shard
from anycontrast_datasets.sources.phantom_config import PhantomConfig
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.stream import StreamConfig, StudyStream

NUM_STUDIES = 500
SPACING_MM = (10.0, 10.0, 10.0)

# Two epochs of 500 end inside step 63.
STREAM = StreamConfig(studies_per_step=16, packs_per_step=4)
NUM_STEPS = 63
PATCH = (8, 8, 8)
SEED = 11

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
        split_fractions=(1.0, 0.0, 0.0),
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


def serve(
    shards: Path, folder: Path, until_step: int, *, ranks: int = 1, threads: int = 2
) -> dict[str, Any]:
    """Go on from `state.json` up to a step; the state is kept after every step.

    What was served lies in `steps/`, one file a step and rank, what was audited in `audits/`.
    """
    store = open_store(shards)
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    (folder / "audits").mkdir(exist_ok=True)
    saved = folder / "state.json"
    state = json.loads(saved.read_text()) if saved.is_file() else {"next_step": 0}
    config = replace(STREAM, num_threads=threads)
    start = state["next_step"]
    streams = [
        StudyStream(store, config, PATCH, seed=SEED, rank=rank, world_size=ranks, start_step=start)
        for rank in range(ranks)
    ]
    for stream in streams if start else ():
        stream.restore(state)
    for step in range(start, until_step):
        packs = [next(stream) for stream in streams]
        ids = [pack.study_ids for of_rank in packs for pack in of_rank.packs]
        (folder / "steps" / f"{step:04d}.json").write_text(json.dumps(ids))
        for epoch in packs[0].finished_epochs:
            total = reduce(add, (stream.tally(epoch) for stream in streams))
            audits = [stream.close_epoch(epoch, total) for stream in streams]
            (folder / "audits" / f"{epoch}.txt").write_text(audits[0].line())
        state = combine_states([stream.state_dict(step + 1) for stream in streams])
        saved.with_suffix(".tmp").write_text(json.dumps(state))
        saved.with_suffix(".tmp").replace(saved)
    for stream in streams:
        stream.close()
    return state


def id_hash(folder: Path) -> str:
    """Hash of every study id served, in order of step, pack and slot."""
    steps = sorted((folder / "steps").iterdir())
    assert [path.stem for path in steps] == [f"{step:04d}" for step in range(len(steps))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in steps)).hexdigest()


def serve_and_kill(shards: Path, folder: Path, at_step: int) -> int:
    """Let another process serve, and kill it once it has done a step; returns the steps kept."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(str(root / part) for part in ("platform", "kernels", "datasets"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(shards), str(folder)]
    with subprocess.Popen(command, env=environment) as reader:
        deadline = time.monotonic() + 120
        while not (folder / "steps" / f"{at_step:04d}.json").is_file():
            assert reader.poll() is None, "the reader died by itself"
            assert time.monotonic() < deadline, "the reader serves nothing"
            time.sleep(0.005)
        reader.kill()
    kept = int(json.loads((folder / "state.json").read_text())["next_step"])
    assert kept < NUM_STEPS
    return kept


def test_two_epochs_with_five_interruptions_are_the_same_stream(
    phantom_500: tuple[Path, Path, ShardSummary], tmp_path: Path
) -> None:
    shards = phantom_500[1]
    whole = serve(shards, tmp_path / "whole", NUM_STEPS)
    parted = tmp_path / "parted"
    stops = sorted(int(n) for n in np.random.default_rng(0).choice(range(2, 60), 5, replace=False))
    places = [(1, 1), (2, 3), (4, 1), (1, 4)]
    for stop, (ranks, threads) in zip(stops[:-1], places, strict=True):
        serve(shards, parted, stop, ranks=ranks, threads=threads)
    assert serve_and_kill(shards, parted, stops[-1]) >= stops[-2]
    state = serve(shards, parted, NUM_STEPS, ranks=2)
    assert id_hash(parted) == id_hash(tmp_path / "whole")
    assert json.loads(json.dumps(state)) == json.loads(json.dumps(whole))
    assert len(json.dumps(state)) < 64_000
    for epoch in range(2):
        lines = {
            (run / "audits" / f"{epoch}.txt").read_text() for run in (tmp_path / "whole", parted)
        }
        assert len(lines) == 1
        assert f"epoch {epoch}: 500 studies = 500 served + 0 quarantined" in lines.pop()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), NUM_STEPS)
