"""The verbs that look at, hand on and change a data set, typed as a user types them."""

import json
from pathlib import Path

import pytest

from anycontrast.cli import main
from anycontrast.training.config import load_config
from anycontrast_datasets.manifest import read_manifest
from anycontrast_datasets.store.reader import open_store

Capture = pytest.CaptureFixture[str]


def told(capsys: Capture, *argv: str) -> dict[str, object]:
    capsys.readouterr()
    assert main(list(argv)) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def test_a_run_is_reported_described_and_copied(run_copy: Path, capsys: Capture) -> None:
    run = load_config(run_copy)
    page = Path(str(told(capsys, "report", str(run_copy))["report"]))
    assert page == run.paths.report / "dataset.html"
    assert "<svg" in page.read_text(encoding="utf-8")
    named = told(capsys, "report", str(run.paths.manifest), f"report.out={page.parent / 'x'}")
    assert named["studies"] == told(capsys, "report", str(run_copy))["studies"]
    text = Path(str(told(capsys, "croissant", str(run_copy))["croissant"])).read_text()
    assert json.loads(text)["name"] == run.name
    told(capsys, "zarr", str(run_copy))
    shards, zarr = open_store(run.paths.shards), open_store(run.paths.zarr)
    assert zarr.fingerprint == shards.fingerprint
    assert main(["validate", str(run_copy), f"store.location={run.paths.zarr}"]) == 0


def test_a_withdrawn_subject_is_in_nothing_that_is_handed_on(
    run_copy: Path, capsys: Capture
) -> None:
    run = load_config(run_copy)
    told(capsys, "zarr", str(run_copy))
    studies = read_manifest(run.paths.manifest / "manifest.parquet")
    subject = next(s.subject_id for s in studies if s.split == "train")
    models = told(capsys, "which-models", subject, str(run_copy))
    assert len(list(models["affected"])) > 0  # type: ignore[call-overload]
    withdrawn = told(capsys, "withdraw", subject, str(run_copy))
    assert withdrawn["affected"] == models["affected"]
    for store in (open_store(run.paths.shards), open_store(run.paths.zarr)):
        assert subject not in {record.subject_id for record in store.records}
        assert store.verify() == []
    assert main(["withdraw", "nobody", str(run_copy)]) == 3
    assert "withdrawing from" in capsys.readouterr().err


def test_a_benchmark_prints_one_line_of_json_when_asked(tmp_path: Path, capsys: Capture) -> None:
    small = [f"folder={tmp_path}", "num_studies=2000", "world_size=4", "rounds=1"]
    assert main(["bench", "manifest", *small, "json=true"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line)["open_s"] > 0
    assert main(["bench", "manifest", "json=maybe"]) == 2
    assert main(["bench", "nothing"]) == 2
    assert "manifest" in capsys.readouterr().err
