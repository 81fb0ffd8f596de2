"""Stages: what a run leaves behind, and what is used again when it is run again."""

import json
import logging
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from anycontrast import stages
from anycontrast.cli import main
from anycontrast.training.config import Config, ConfigError, load_config


def test_a_run_leaves_one_folder_per_stage_and_nothing_else(tiny_run: Config) -> None:
    assert sorted(p.name for p in tiny_run.paths.run.iterdir()) == [
        "finetune",
        "manifest",
        "pretrain",
        "release",
        "report",
        "shards",
        "source",
    ]
    assert (tiny_run.paths.report / "loss.png").is_file()


def test_results_count_what_went_in_and_out(run_copy: Path) -> None:
    config = load_config(run_copy)
    scanned, sharded = stages.scan(config), stages.shard(config)
    assert scanned["inputs"] == scanned["accepted"] + scanned["refused"] > 0
    assert sharded["studies"] == sharded["sharded"] + sharded["refused"] == scanned["studies"]
    assert Path(scanned["ledger"]).is_file()
    json.dumps([scanned, sharded])


def test_nothing_changed_is_reused_and_said(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(run_copy)
    # The copy lies elsewhere and has other times; the first run in it is a new one.
    stages.scan(config)
    before = _state(config.paths.run)
    for name in ("scan", "shard", "evaluate", "export"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            getattr(stages, name)(config)
        assert "reused" in caplog.text, name
    assert _state(config.paths.run) == before


def test_training_that_is_done_is_not_done_again(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pretrained = stages.pretrain(load_config(run_copy))
        finetuned = stages.finetune(load_config(run_copy))
    assert caplog.text.count("all 4 steps are done already") == 2
    assert pretrained["step"] == finetuned["step"] == 4
    assert pretrained["loss"] > 0


def test_a_changed_setting_makes_the_manifest_again(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages.scan(load_config(run_copy))
    with caplog.at_level(logging.INFO):
        result = stages.scan(load_config(run_copy, ["scan.contrasts=[DWI]"]))
    assert "reused" not in caplog.text.replace("reusing", "")
    assert result["refused_by_code"]["contrast_not_selected"] > 0


def test_a_changed_source_file_makes_the_manifest_again(
    run_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "runs" / "tiny" / "source"
    words = ["name=bids", "scan.source=bids", f"scan.root={root}"]
    first = stages.scan(load_config(run_copy, words))
    image = next(root.rglob("*_ADC.nii.gz"))
    os.utime(image, (1, 1))
    with caplog.at_level(logging.INFO):
        stages.scan(load_config(run_copy, words))
        assert "reused" not in caplog.text
        image.unlink()
        assert stages.scan(load_config(run_copy, words))["inputs"] == first["inputs"] - 1
        assert "reused" not in caplog.text
        stages.scan(load_config(run_copy, words))
        assert "reused" in caplog.text


def test_a_phantom_whose_file_is_gone_is_made_again(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(run_copy)
    stages.scan(config)
    image = next(config.paths.source.rglob("*_ADC.nii.gz"))
    image.unlink()
    with caplog.at_level(logging.INFO):
        stages.scan(config)
    assert image.is_file()
    assert "reused" not in caplog.text


@pytest.mark.parametrize("damaged", ["manifest.parquet", "private/sources.parquet", "stage.json"])
def test_a_damaged_manifest_is_made_again(
    run_copy: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(run_copy)
    stages.scan(config)
    (config.paths.manifest / damaged).write_bytes(b"{")
    with caplog.at_level(logging.INFO):
        stages.scan(config)
    assert "reused" not in caplog.text
    assert stages.shard(config)["refused"] == 0


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_source_that_is_gone_fails_the_scan_and_shard_says_what_it_goes_on_with(
    run_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    root, aside = tmp_path / "runs" / "tiny" / "source", tmp_path / "aside"
    words = ["name=bids", "scan.source=bids", f"scan.root={root}"]
    config = load_config(run_copy, words)
    stages.scan(config)
    stages.shard(config)
    assert "did not finish" not in caplog.text
    before = (config.paths.manifest / "manifest.parquet").read_bytes()
    root.rename(aside)
    if kind == "empty":
        root.mkdir()
    assert main(["scan", str(run_copy), *words]) == 3
    assert (config.paths.manifest / "manifest.parquet").read_bytes() == before
    stages.shard(config)
    assert "the last scan into" in caplog.text
    if kind == "empty":
        root.rmdir()
    aside.rename(root)
    caplog.clear()
    stages.scan(config)
    stages.shard(config)
    assert "did not finish" not in caplog.text


def test_a_lost_shard_is_written_again_with_the_same_bytes(run_copy: Path) -> None:
    config = load_config(run_copy)
    shard = next(config.paths.shards.glob("shard-*.tar"))
    whole = shard.read_bytes()
    shard.unlink()
    stages.shard(config)
    assert shard.read_bytes() == whole


def test_shards_of_another_manifest_are_named_and_used_by_nothing(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    assert main(["zarr", str(run_copy)]) == 0
    shutil.copytree(run / "shards", tmp_path / "elsewhere")
    words = [str(run_copy), "scan.contrasts=[DWI]"]
    assert main(["scan", *words]) == 0
    for verb in ("validate", "pretrain", "finetune", "evaluate", "zarr"):
        for place in ("", f"store.location={tmp_path / 'elsewhere'}", f"store.location={run}/zarr"):
            capsys.readouterr()
            assert main([verb, *words, *filter(None, [place])]) == 3, verb
            (line,) = capsys.readouterr().err.splitlines()
            assert "made from another manifest" in line
            assert ("set another `name=`" if place else "run `anycontrast shard`") in line
    stages.shard(load_config(run_copy, words[1:]))
    assert main(["validate", *words]) == 0
    assert main(["validate", *words, f"store.location={tmp_path / 'elsewhere'}"]) == 3


def test_a_withdrawal_from_old_shards_says_what_still_holds_the_subject(
    run_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, words = tmp_path / "runs" / "tiny", [str(run_copy), "scan.contrasts=[DWI]"]
    assert main(["zarr", str(run_copy)]) == 0
    assert main(["scan", *words]) == 0
    table = pq.read_table(run / "manifest" / "manifest.parquet", columns=["subject_id", "study_id"])
    subject, study = (table[name][0].as_py() for name in ("subject_id", "study_id"))
    assert main(["withdraw", subject, *words]) == 0
    assert "still holds the subject: run `anycontrast shard`, then" in caplog.text
    assert main(["shard", *words]) == main(["zarr", *words]) == 0
    assert not list((run / "zarr").rglob(f"{study}*"))


def test_a_manifest_of_a_newer_schema_is_named_by_whatever_meets_it(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "tiny" / "manifest" / "manifest.parquet"
    metadata = dict(pq.read_metadata(path).metadata)
    metadata[b"anycontrast.schema_version"] = b"99"
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    for verb in ("validate", "shard", "pretrain", "finetune", "report", "plan", "croissant"):
        assert main([verb, str(run_copy)]) == 3, verb
        assert capsys.readouterr().err.strip().endswith("found 99; upgrade anycontrast")


def test_a_new_model_is_evaluated_again(run_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(run_copy)
    with caplog.at_level(logging.INFO):
        result = stages.evaluate(config)
        assert "reused" in caplog.text
        shutil.rmtree(config.paths.finetune / "scratch")
        caplog.clear()
        alone = stages.evaluate(config)
    assert "reused" not in caplog.text
    assert set(result) == set(alone)
    assert len(alone["dice_of_largest_subset"]) < len(result["dice_of_largest_subset"])


def test_training_makes_the_phantom_only_when_asked_for_it(tmp_path: Path) -> None:
    config = load_config(None, [f"root={tmp_path}", "scan.source=bids", "scan.root=x"])
    with pytest.raises(ConfigError, match=r"no shards in .*run `anycontrast scan CONFIG`"):
        stages.ensure_shards(config)
    assert list(tmp_path.iterdir()) == []


def test_a_window_of_broken_patches_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    words = [f"root={tmp_path}", "finetune.segmenter.window_vox=[20,16,16]"]
    words += ["finetune.from_scratch=true"]
    with pytest.raises(ConfigError, match=r"finetune\.segmenter\.window_vox.*\(20, 16, 16\)"):
        stages.finetune(load_config(None, words))


def _state(root: Path) -> dict[str, tuple[int, bytes]]:
    """Content of every file; when it was written too, for those that are costly."""
    kept = {".tar", ".safetensors", ".gz"}
    return {
        str(p.relative_to(root)): (p.stat().st_mtime_ns if p.suffix in kept else 0, p.read_bytes())
        for p in root.rglob("*")
        if p.is_file()
    }
