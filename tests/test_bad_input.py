"""What bad input gets: one clear line or a ledger entry, the documented exit code, nothing lost."""

import gzip
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from anycontrast.cli import main
from anycontrast.training.config import Config, load_config
from anycontrast_datasets.ledger import Refusal, read_ledger
from anycontrast_datasets.volume import read_volume, write_volume

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Outcome:
    code: int
    error: str
    """The one line that says what is wrong, without its prefix."""
    out: str
    err: str


@pytest.fixture
def run(capsys: Capture) -> Callable[..., Outcome]:
    """Run a command line; at most one line of it is an error, and none is a traceback."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        errors = [
            line for line in captured.err.splitlines() if line.startswith("anycontrast: error: ")
        ]
        assert "Traceback" not in captured.err
        assert len(errors) == (code != 0)
        if code:
            assert captured.out == ""
            assert captured.err.splitlines()[-1] == errors[0]
        text = errors[0].removeprefix("anycontrast: error: ") if errors else ""
        return Outcome(code, text, captured.out, captured.err)

    return call


def write_nifti(path: Path, *, shape: tuple[int, int, int] = (12, 12, 12), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(1, 999, size=shape).astype(np.int16)
    write_volume(path, array, np.diag([8.0, 8.0, 8.0, 1.0]))


@pytest.fixture
def study_tree(tmp_path: Path) -> Path:
    """Two plain subjects in BIDS order, two volumes each."""
    root = tmp_path / "data"
    for number in (1, 2):
        for seed, contrast in enumerate(("T1w", "FLAIR")):
            name = f"sub-{number}/anat/sub-{number}_{contrast}.nii.gz"
            write_nifti(root / name, seed=10 * number + seed)
    return root


@pytest.fixture
def scan(run: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Scan a folder as BIDS into `tmp_path/runs/demo`."""

    def call(root: Path, *words: str) -> Outcome:
        return run(
            "scan",
            f"root={tmp_path / 'runs'}",
            "scan.source=bids",
            f"scan.root={root}",
            "scan.check_pictures=false",
            *words,
        )

    return call


def ledger_of(tmp_path: Path) -> dict[str, Refusal]:
    path = tmp_path / "runs" / "demo" / "manifest" / "private" / "ledger.csv"
    return {refusal.location: refusal for refusal in read_ledger(path)}


def flip_bit(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    path.write_bytes(data)


# Folders and files of the source


def test_a_missing_folder(scan: Callable[..., Outcome], tmp_path: Path) -> None:
    found = scan(tmp_path / "nowhere")
    assert found.code == 3
    assert str(tmp_path / "nowhere") in found.error
    assert "no such folder; correct scan.root" in found.error


def test_an_empty_folder(scan: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = scan(tmp_path / "empty")
    assert found.code == 3
    assert "no image file in the folder (.nii, .nii.gz); correct scan.root" in found.error


def test_a_file_for_a_folder(scan: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = scan(tmp_path / "file")
    assert found.code == 3
    assert "must be a folder, found a file" in found.error


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _lie(path: Path) -> None:
    """A file of about 1 kB whose header claims 15 GB."""
    header = bytearray(gzip.decompress(path.read_bytes())[:352])
    struct.pack_into("<8h", header, 40, 3, 2500, 2500, 1200, 1, 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(header) + bytes(700)))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_bytes(gzip.compress(b"not an image" * 99)), "unreadable_header"),
    "empty": (lambda p: p.write_bytes(b""), "empty_file"),
    "truncated": (_truncate, "truncated"),
    "flipped": (lambda p: flip_bit(p, p.stat().st_size - 6), "gzip_corrupt"),
    "header lie": (_lie, "too_large"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_in_the_ledger_and_the_others_are_accepted(
    study_tree: Path, scan: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    damage, code = BAD_FILES[kind]
    damage(study_tree / "sub-1" / "anat" / "sub-1_FLAIR.nii.gz")
    found = scan(study_tree)
    assert found.code == 0
    counts = json.loads(found.out)
    assert (counts["inputs"], counts["accepted"], counts["refused"]) == (4, 3, 1)
    (refusal,) = ledger_of(tmp_path).values()
    assert refusal.location == "sub-1/anat/sub-1_FLAIR.nii.gz"
    assert refusal.code == code
    assert refusal.reason
    assert refusal.remedy


def test_nothing_accepted_is_an_error_after_the_ledger_is_written(
    study_tree: Path, scan: Callable[..., Outcome], tmp_path: Path
) -> None:
    for image in study_tree.rglob("*.nii.gz"):
        image.write_bytes(b"")
    found = scan(study_tree)
    assert found.code == 3
    assert "none of 4 files was accepted: {'empty_file': 4}" in found.error
    assert "ledger.csv" in found.error
    assert len(ledger_of(tmp_path)) == 4


def test_an_unknown_contrast_in_a_file_name(
    study_tree: Path, scan: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_nifti(study_tree / "sub-1" / "anat" / "sub-1_wobble.nii.gz")
    assert scan(study_tree).code == 0
    (refusal,) = ledger_of(tmp_path).values()
    assert refusal.code == "unknown_contrast"
    assert "table" in refusal.remedy


def test_an_unknown_contrast_in_a_table(
    study_tree: Path, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(
        "file,subject,session,contrast,label\n"
        "sub-1/anat/sub-1_T1w.nii.gz,a,1,T1w,\n"
        "sub-1/anat/sub-1_FLAIR.nii.gz,a,1,FLAAIR,\n"
    )
    words = ["scan.source=folder", f"scan.root={study_tree}", f"scan.table={table}"]
    found = run("scan", f"root={tmp_path / 'runs'}", "scan.check_pictures=false", *words)
    assert found.code == 0
    ledger = ledger_of(tmp_path)
    assert ledger["sub-1/anat/sub-1_FLAIR.nii.gz"].code == "unknown_contrast"
    assert "FLAIR" in ledger["sub-1/anat/sub-1_FLAIR.nii.gz"].reason
    assert ledger["sub-2/anat/sub-2_T1w.nii.gz"].code == "not_in_table"


def test_an_unknown_contrast_in_the_configuration(run: Callable[..., Outcome]) -> None:
    found = run("scan", "scan.contrasts=[FLARE]")
    assert found.code == 2
    assert "FLARE" in found.error
    assert "FLAIR" in found.error


def test_two_volumes_of_one_contrast(
    study_tree: Path, scan: Callable[..., Outcome], tmp_path: Path
) -> None:
    for run_number in (1, 2):
        write_nifti(study_tree / f"sub-1/anat/sub-1_run-{run_number}_T2w.nii.gz", seed=run_number)
    found = scan(study_tree)
    assert found.code == 0
    counts = json.loads(found.out)
    assert counts["inputs"] == 6 == counts["accepted"] + counts["refused"]
    codes = {refusal.code for refusal in ledger_of(tmp_path).values()}
    assert codes == {"duplicate_contrast"}


def test_a_mask_on_a_foreign_grid(
    study_tree: Path, scan: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = study_tree / "derivatives" / "x" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    mask = np.zeros((9, 9, 9), dtype=np.uint8)
    mask[4, 4, 4] = 1
    write_volume(folder / "sub-1_desc-lesion_mask.nii.gz", mask, np.diag([5.0, 5.0, 5.0, 1.0]))
    found = scan(study_tree)
    assert found.code == 0
    (refusal,) = ledger_of(tmp_path).values()
    assert refusal.code == "mask_grid_mismatch"
    assert json.loads(found.out)["accepted"] == 4


def test_a_phantom_folder_with_foreign_files(
    run: Callable[..., Outcome], write_tiny_yaml: Callable[[Path], Path], tmp_path: Path
) -> None:
    mine = tmp_path / "runs" / "tiny" / "source" / "mine.nii.gz"
    write_nifti(mine)
    before = mine.read_bytes()
    found = run("scan", write_tiny_yaml(tmp_path))
    assert found.code == 3
    assert "mine.nii.gz; choose an empty folder or delete this one" in found.error
    assert mine.read_bytes() == before


def test_a_source_that_changed_since_the_scan_is_refused_by_study(
    run_copy: Path, run: Callable[..., Outcome]
) -> None:
    config = load_config(run_copy)
    assert run("scan", run_copy).code == 0
    image = next(config.paths.source.rglob("sub-0001*_ADC.nii.gz"))
    volume = read_volume(image)
    write_volume(image, volume.array + 1, volume.affine)
    shutil.rmtree(config.paths.shards)
    found = run("shard", run_copy)
    assert found.code == 0
    counts = json.loads(found.out)
    assert counts["refused_by_code"] == {"source_changed": 1}
    assert counts["studies"] == counts["sharded"] + counts["refused"] == 10


# Configuration and words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain.stepz=3"], "unknown key 'pretrain.stepz'; did you mean 'pretrain.steps'?"),
        (["pretrian.steps=3"], "did you mean 'pretrain'?"),
        (["pretrain.steps=many"], "pretrain.steps"),
        (["model.patch_vox=[8,8]"], "model.patch_vox"),
        (["masking.hidden_fraction=1.5"], "hidden_fraction"),
        (["scan.source=minc"], "scan.source"),
        (["name=../up"], "name must be letters"),
        (["nowhere.yaml"], "no file nowhere.yaml"),
        (["a.yaml", "b.yaml"], "expected at most one config file"),
        (["--steps", "3"], "no option '--steps'; settings are key=value words"),
        (["seed=${oc.env:HOME}"], "resolvers"),
    ],
)
def test_a_setting_that_cannot_be(
    run: Callable[..., Outcome], words: list[str], message: str
) -> None:
    found = run("pretrain", *words)
    assert found.code == 2
    assert message in found.error


@pytest.mark.parametrize("word", ["seed={a:[1]}", "seed=[1", "seed={", 'name="x', "x=: :"])
def test_a_setting_that_is_no_yaml(run: Callable[..., Outcome], word: str) -> None:
    found = run("pretrain", word)
    assert found.code == 2
    assert word.partition("=")[0] in found.error


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\tname: x", "name: x\nname: y\n", "\xff"])
def test_a_file_that_is_no_configuration(
    run: Callable[..., Outcome], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    found = run("pretrain", path)
    assert found.code == 2
    assert str(path) in found.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "no verb 'pretrian'; did you mean 'pretrain'?"),
        (["fly"], "no verb 'fly'; verbs: scan, shard"),
        (["pull"], "expected PATH_OR_URL, got nothing; usage: anycontrast pull"),
        (["pull", "a", "b"], "expected PATH_OR_URL, got a b"),
        (["predict", "a", "b"], "expected RELEASE STUDY_DIR OUT, got a b"),
        (["verify", "a", "x.y=1"], "verify takes no settings"),
    ],
)
def test_words_that_do_not_fit(run: Callable[..., Outcome], words: list[str], message: str) -> None:
    found = run(*words)
    assert found.code == 2
    assert message in found.error


# What a run has made


def test_a_stage_without_the_stage_before_it(run: Callable[..., Outcome], tmp_path: Path) -> None:
    root = f"root={tmp_path}"
    for verb, code, remedy in (
        ("shard", 3, "scan"),
        ("validate", 3, "scan"),
        ("evaluate", 5, "`anycontrast finetune`"),
        ("export", 5, "`anycontrast pretrain`"),
    ):
        found = run(verb, root)
        assert found.code == code, verb
        assert remedy in found.error
    found = run("pretrain", root, "scan.source=bids", f"scan.root={tmp_path}")
    assert found.code == 2
    assert "`anycontrast scan CONFIG`" in found.error


def test_a_shard_with_a_flipped_bit_is_found_and_mended(
    run_copy: Path, run: Callable[..., Outcome]
) -> None:
    config = load_config(run_copy)
    shard = sorted(config.paths.shards.glob("*.tar"))[0]
    whole = shard.read_bytes()
    flip_bit(shard)
    found = run("validate", run_copy)
    assert found.code == 3
    assert f"shard {shard.name}" in found.error
    assert "run `anycontrast shard` again" in found.error
    assert run("shard", run_copy).code == 0
    assert shard.read_bytes() == whole
    assert run("validate", run_copy).code == 0


def test_pretraining_stops_at_a_flipped_bit_and_keeps_its_checkpoints(
    run_copy: Path, run: Callable[..., Outcome]
) -> None:
    config = load_config(run_copy)
    kept = sorted(p.name for p in (config.paths.pretrain / "checkpoints").iterdir())
    for shard in config.paths.shards.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        # Every study: the first bytes of each volume's compressed block, past the tar headers.
        for at in range(600, len(data), 2048):
            data[at] ^= 4
        shard.write_bytes(data)
    found = run("pretrain", run_copy, "pretrain.steps=8")
    assert found.code == 3
    assert "shard-00000" in found.error
    assert "run `anycontrast shard` again" in found.error
    assert sorted(p.name for p in (config.paths.pretrain / "checkpoints").iterdir()) == kept


def test_a_lost_shard_is_named(run_copy: Path, run: Callable[..., Outcome]) -> None:
    shard = sorted(load_config(run_copy).paths.shards.glob("*.tar"))[0]
    shard.unlink()
    found = run("pretrain", run_copy, "pretrain.steps=8")
    assert found.code == 3
    assert f"shard {shard.name}: missing" in found.error


def test_a_checkpoint_with_a_missing_file(run_copy: Path, run: Callable[..., Outcome]) -> None:
    root = load_config(run_copy).paths.pretrain / "checkpoints"
    newest = sorted(root.iterdir())[-1]
    (newest / "model.safetensors").unlink()
    found = run("export", run_copy)
    assert found.code == 0
    assert f"{newest.name}: model.safetensors is missing" in found.err
    for other in root.iterdir():
        (other / "state.json").unlink()
    for words in (["export"], ["pretrain"], ["finetune", "finetune.steps=8"]):
        found = run(words[0], run_copy, *words[1:])
        assert found.code == 5, words
        assert str(root) in found.error
    assert newest.is_dir()


def test_resuming_passes_a_damaged_checkpoint_by(
    run_copy: Path, run: Callable[..., Outcome]
) -> None:
    root = load_config(run_copy).paths.pretrain / "checkpoints"
    names = sorted(p.name for p in root.iterdir())
    (root / names[-1] / "model.safetensors").unlink()
    found = run("pretrain", run_copy)
    assert found.code == 0
    assert "model.safetensors is missing" in found.err
    assert json.loads(found.out)["step"] == 4
    assert any(p.name.startswith(f"{names[-1]}.damaged-") for p in root.iterdir())


def test_a_release_with_a_changed_byte(
    tiny_run: Config, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    release = Path(shutil.copytree(tiny_run.paths.release / "segmenter", tmp_path / "release"))
    flip_bit(release / "model.safetensors")
    study = next((tiny_run.paths.source / "sub-0001").iterdir())
    for words in (
        ["verify", release],
        ["pull", release, f"pull.cache={tmp_path / 'cache'}"],
        ["predict", release, study, tmp_path / "out"],
    ):
        found = run(*words)
        assert found.code == 6, words
        assert "model.safetensors is not the file that was released" in found.error
    assert not (tmp_path / "out").exists()
    assert not any((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_written(
    run: Callable[..., Outcome], write_tiny_yaml: Callable[[Path], Path], tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file")
    found = run("scan", write_tiny_yaml(tmp_path))
    assert found.code == 3
    assert f"{tmp_path / 'runs'}" in found.error


# The same from a real process: nothing but our line on standard error


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["scan", "scan.source=bids", "scan.root=/no/such/folder"], 3),
        (["pretrain", "pretrain.stepz=3"], 2),
        (["verify", "/no/such/folder"], 6),
        (["export"], 5),
    ],
)
def test_a_process_ends_with_one_line_and_its_code(
    words: list[str], code: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anycontrast.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("anycontrast: error: ")
