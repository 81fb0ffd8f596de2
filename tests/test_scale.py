"""45,000 studies as a user has them before any voxel is read: planned and reported by the verbs."""

import json
from pathlib import Path

import pytest

from anycontrast.bench.synthetic_manifest import write_synthetic_manifest
from anycontrast.cli import main

NUM_STUDIES = 45_000


def test_45000_rows_are_planned_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "scale" / "manifest"
    manifest.mkdir(parents=True)
    write_synthetic_manifest(manifest / "manifest.parquet", NUM_STUDIES)
    words = [
        f"root={tmp_path}",
        "name=scale",
        "scan.source=bids",
        "scan.root=/nowhere",
        "plan.ranks=[1,64,1024]",
        "plan.gpus=64",
        "pretrain.stream.pack_tokens=16384",
        "pretrain.stream.packs_per_step=1024",
        "pretrain.stream.studies_per_step=1024",
    ]
    assert main(["plan", *words, "json=true"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["studies"]["manifest"] == NUM_STUDIES
    assert {entry["stats"]["world_size"] for entry in plan["ranks"]} == {1, 64, 1024}
    assert main(["plan", *words]) == 0
    assert "1,024" in capsys.readouterr().out
    assert main(["report", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert result["studies"] == NUM_STUDIES
    assert "45,000" in page
