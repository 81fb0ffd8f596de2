"""Export: what a release holds, and that it is refused as soon as one byte or file differs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from anycontrast import stages
from anycontrast.release.errors import ReleaseError, ReleaseNotFoundError
from anycontrast.release.export import ExportConfig
from anycontrast.release.files import MANIFEST, verify_release
from anycontrast.training.config import Config, ConfigError, load_config

KINDS = ("encoder", "segmenter")


@pytest.fixture
def release(tiny_run: Config, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.paths.release / "encoder", tmp_path / "encoder"))


def test_a_release_holds_a_closed_list_of_files(tiny_run: Config) -> None:
    listed = {kind: {p.name for p in (tiny_run.paths.release / kind).iterdir()} for kind in KINDS}
    assert listed["encoder"] == {"config.json", "model.safetensors", "README.md", MANIFEST}
    assert listed["segmenter"] == listed["encoder"] | {"eval.json"}
    for kind in KINDS:
        assert set(verify_release(tiny_run.paths.release / kind)["files"]) == listed[kind] - {
            MANIFEST
        }


def test_the_decoder_stays_behind(tiny_run: Config) -> None:
    for kind in KINDS:
        with safe_open(tiny_run.paths.release / kind / "model.safetensors", "pt") as weights:
            names = list(weights.keys())
        assert names
        assert not [n for n in names if "mask_token" in n or n.startswith("decoder.blocks")]
    with safe_open(tiny_run.paths.release / "encoder" / "model.safetensors", "pt") as weights:
        assert not [n for n in weights.keys() if "decoder" in n]  # noqa: SIM118


def test_the_config_says_what_another_team_needs(tiny_run: Config) -> None:
    facts = json.loads((tiny_run.paths.release / "segmenter" / "config.json").read_text())
    assert facts["name"] == "tiny-segmenter"
    assert facts["kind"] == "segmenter"
    assert facts["model"]["width"] == 64
    assert facts["segmenter"]["regions"] == {"lesion": [1, 2, 3, 4], "core": [1, 3]}
    assert facts["prepare"]["spacing_mm"] == [8.0, 8.0, 8.0]
    assert facts["contrasts_seen"]["DWI"] == facts["contrasts_seen"]["ADC"] > 0
    assert facts["training"]["step"] == 4
    assert facts["training"]["from_scratch"] is False
    assert facts["training"]["pretrained_encoder"]["step"] == 4
    assert facts["training"]["dataset"] == "phantom"
    assert len(facts["training"]["dataset_fingerprint"]) == 64


def test_the_card_opens_with_metadata_and_shows_the_score(tiny_run: Config) -> None:
    cards = {k: (tiny_run.paths.release / k / "README.md").read_text() for k in KINDS}
    metadata = {kind: yaml.safe_load(card.split("---")[1]) for kind, card in cards.items()}
    assert metadata["encoder"]["license"] == "apache-2.0"
    assert metadata["encoder"]["pipeline_tag"] == "image-feature-extraction"
    assert metadata["segmenter"]["pipeline_tag"] == "image-segmentation"
    assert metadata["segmenter"]["library_name"] == "anycontrast"
    assert "| DWI+ADC | lesion | pretrained |" in cards["segmenter"]
    assert "not a medical device" in cards["encoder"]
    assert "Not evaluated" in cards["encoder"]


def test_exporting_again_gives_the_same_bytes(run_copy: Path, tiny_run: Config) -> None:
    config = load_config(run_copy)
    shutil.rmtree(config.paths.release)
    stages.export(config)
    for kind in KINDS:
        old, new = tiny_run.paths.release / kind, config.paths.release / kind
        assert {p.name: p.read_bytes() for p in new.iterdir()} == {
            p.name: p.read_bytes() for p in old.iterdir()
        }
    assert sorted(p.name for p in config.paths.release.iterdir()) == list(KINDS)


def test_a_damaged_release_is_replaced(run_copy: Path) -> None:
    config = load_config(run_copy)
    weights = config.paths.release / "encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    stages.export(config)
    assert weights.read_bytes() == whole


def test_another_licence_comes_with_its_text(run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("terms")
    words = ["export.license=LicenseRef-ours", f"export.license_file={tmp_path / 'terms.txt'}"]
    config = load_config(run_copy, words)
    stages.export(config)
    folder = config.paths.release / "encoder"
    assert (folder / "LICENSE").read_text() == "terms"
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "LicenseRef-ours"
    verify_release(folder)


def test_a_missing_licence_file_is_said_before_anything_is_written(run_copy: Path) -> None:
    config = load_config(run_copy, ["export.license_file=nowhere.txt"])
    with pytest.raises(ConfigError, match=r"export\.license_file: no file nowhere\.txt"):
        stages.export(config)


@pytest.mark.parametrize("values", [{"license": "x\nlicense: mit"}, {"name": "../up"}])
def test_names_that_would_break_the_card_or_the_cache_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"export\.(license|name) must be"):
        ExportConfig(**values)


def test_shards_the_model_never_saw_are_not_claimed(run_copy: Path) -> None:
    config = load_config(run_copy, ["prepare.box_multiple_vox=16"])
    stages.shard(config)
    with pytest.raises(ReleaseError, match=r"trained on shards \w{16}, the run folder now holds"):
        stages.export(config)


def test_only_the_finetuned_model_from_scratch_is_released_as_such(run_copy: Path) -> None:
    config = load_config(run_copy)
    shutil.rmtree(config.paths.finetune / "pretrained")
    stages.export(config)
    facts = json.loads((config.paths.release / "segmenter" / "config.json").read_text())
    assert facts["training"]["from_scratch"] is True


def test_the_score_of_another_checkpoint_is_not_released(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(run_copy)
    report = config.paths.report / "dice_by_subset.json"
    measured = json.loads(report.read_text())
    eval_json = config.paths.release / "segmenter" / "eval.json"
    names = {**measured, "digests": dict.fromkeys(measured["digests"], "0" * 64)}
    for unknown in (names, {k: v for k, v in measured.items() if k != "digests"}):
        report.write_text(json.dumps(unknown))
        caplog.clear()
        stages.export(config)
        assert "measured another checkpoint" in caplog.text
        assert not eval_json.exists()
    report.write_text(json.dumps(measured))
    caplog.clear()
    stages.export(config)
    assert "another checkpoint" not in caplog.text
    assert json.loads(eval_json.read_text()) == measured


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _relist(folder: Path, name: str) -> None:
    _edit(folder, lambda m: m["files"].update({name: m["files"]["README.md"]}))


def _link(folder: Path) -> None:
    card = folder / "README.md"
    card.rename(folder.parent / "README.md")
    card.symlink_to(folder.parent / "README.md")


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (
        lambda f: _flip(f / "model.safetensors"),
        r"model\.safetensors is not the file that was released",
    ),
    "a flipped bit in the config": (lambda f: _flip(f / "config.json"), r"config\.json is not the"),
    "a missing file": (lambda f: (f / "config.json").unlink(), r"missing files \['config\.json'\]"),
    "an extra file": (
        lambda f: (f / "run.py").write_text("print()"),
        r"should not have \['run\.py'\]",
    ),
    "a pickle": (lambda f: (f / "model.pt").write_bytes(b"x"), r"should not have \['model\.pt'\]"),
    "a hidden file": (lambda f: (f / ".x").write_text(""), r"should not have \['\.x'\]"),
    "a link": (_link, r"README\.md is a link"),
    "a longer file": (
        lambda f: _append(f / "README.md"),
        r"README\.md has \d+ bytes, its manifest says \d+",
    ),
    "a renamed file": (
        lambda f: (f / "README.md").rename(f / "LICENSE"),
        r"missing files \['README\.md'\].*\['LICENSE'\]",
    ),
    "swapped files": (
        lambda f: (f / "README.md").write_bytes((f / "config.json").read_bytes()),
        r"README\.md has \d+ bytes",
    ),
    "a folder for a file": (
        lambda f: _make_folder(f / "README.md"),
        r"README\.md is not a plain file",
    ),
    "a newer format": (
        lambda f: _edit(f, lambda m: m.update(format_version=2)),
        r"format 2",
    ),
    "a name above": (lambda f: _relist(f, "../x"), r"lists '\.\./x'; do not use it"),
    "an absolute name": (lambda f: _relist(f, "/etc/x"), r"lists '/etc/x'"),
    "code by name": (lambda f: _relist(f, "model.py"), r"lists 'model\.py'"),
    "a name with a newline": (lambda f: _relist(f, "README.md\n"), r"may hold .* only"),
    "no weights listed": (
        lambda f: _edit(f, lambda m: m["files"].pop("model.safetensors")),
        r"lists no model\.safetensors",
    ),
    "a negative size": (
        lambda f: _edit(f, lambda m: m["files"]["README.md"].update(size=-1)),
        r"no size or no sha256 for README\.md",
    ),
    "garbage": (
        lambda f: (f / MANIFEST).write_bytes(b"\xff\x00"),
        r"its manifest\.json is not one",
    ),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), r"its manifest\.json is not one"),
    "deep nesting": (
        lambda f: (f / MANIFEST).write_text("[" * 100_000),
        r"its manifest\.json is not one",
    ),
    "a version that is no number": (
        lambda f: _edit(f, lambda m: m.update(format_version="1")),
        r"format_version '1'",
    ),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_a_tampered_release_is_refused_by_name(release: Path, kind: str) -> None:
    verify_release(release)
    tamper, message = TAMPERINGS[kind]
    tamper(release)
    with pytest.raises(ReleaseError, match=message):
        verify_release(release)


def test_the_folder_that_holds_releases_is_named_apart(tiny_run: Config) -> None:
    with pytest.raises(
        ReleaseNotFoundError, match=r"did you mean .*release/encoder or .*segmenter"
    ):
        verify_release(tiny_run.paths.release)
    with pytest.raises(ReleaseNotFoundError, match="no release in"):
        verify_release(tiny_run.paths.run / "nowhere")


def test_an_export_that_is_killed_leaves_the_old_release(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(run_copy, ["export.description=new"])
    before = (config.paths.release / "encoder" / "README.md").read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", os.fspath(config.paths.release))

    monkeypatch.setattr("anycontrast.release.export.write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        stages.export(config)
    assert (config.paths.release / "encoder" / "README.md").read_bytes() == before
    assert sorted(p.name for p in config.paths.release.iterdir()) == list(KINDS)


def test_a_model_that_saw_faces_gets_no_open_licence(run_copy: Path) -> None:
    config = load_config(run_copy)
    record = config.paths.shards / "dataset.json"
    dataset = json.loads(record.read_text())
    dataset["shard"]["faces"] = "allow"
    record.write_text(json.dumps(dataset))
    with pytest.raises(ReleaseError, match=r"may not be released as Apache-2\.0"):
        stages.export(config)
    own = load_config(run_copy, ["export.license=LicenseRef-Ours"])
    assert len(stages.export(own)["releases"]) == 2
