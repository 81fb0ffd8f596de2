"""The command line: help, words, exit codes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from anycontrast import __version__
from anycontrast.cli import exit_code_of, guarded, main, message_of
from anycontrast.release.errors import ReleaseError, ReleaseNotFoundError
from anycontrast.training.checkpoint import CheckpointError
from anycontrast.training.config import Config, ConfigError
from anycontrast.training.loop import TrainingError, TrainingInterrupted
from anycontrast.verbs import VERBS, UsageError
from anycontrast_datasets.study import ManifestError, ShardError, StudyError, VolumeError

Capture = pytest.CaptureFixture[str]

# Runs as if the modules named in the first word were not installed.
WITHOUT_EXTRAS = """
import sys
from pathlib import Path

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        is_hidden = name.partition(".")[0] in hidden
        return None if is_hidden else self.finder.find_spec(name, path, target)

hidden = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
from anycontrast.cli import main

release, study, folder = sys.argv[1:]
codes = [main(["pull", release, f"pull.cache={folder}/cache"])]
(pulled,) = Path(folder, "cache").iterdir()
codes += [
    main(["verify", str(pulled)]),
    main(["predict", str(pulled), study, f"{folder}/out", "predict.device=cpu"]),
]
try:
    import ray
except ModuleNotFoundError as error:
    print(codes, "refused", error.name)
"""


def test_help_names_every_verb_and_exit_code(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in VERBS)
    assert "Exit codes: 0 done" in out
    assert "runs/demo/" in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_no_word_shows_the_help_and_fails(capsys: Capture) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: anycontrast VERB" in captured.err


def test_the_version_is_printed_alone(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_explains_itself(name: str, capsys: Capture) -> None:
    assert main([name, "x", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: anycontrast {name} ")
    assert VERBS[name].help in out


def test_help_lists_every_setting_with_default_and_meaning(capsys: Capture) -> None:
    main(["predict", "--help"])
    out = capsys.readouterr().out
    assert '  predict.device="auto"\n      `cpu`, `cuda`' in out
    main(["finetune", "--help"])
    out = capsys.readouterr().out
    assert "  finetune.segmenter.window_vox=[128, 128, 128]" in out
    assert "finetune.resume=true\n      Go on from the newest verified checkpoint" in out


def test_every_setting_of_a_verb_is_explained(capsys: Capture) -> None:
    bare = []
    for name in VERBS.keys() - {"bench"}:
        main([name, "--help"])
        lines = capsys.readouterr().out.splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if "=" in line and line.startswith("  ") and not line.startswith("    "):
                bare += [] if after.startswith("      ") else [line.strip()]
    assert len(bare) <= 12, bare


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (ConfigError("x"), 2),
        (StudyError("x"), 3),
        (ManifestError("x"), 3),
        (VolumeError("x"), 3),
        (ShardError("x"), 3),
        (FileNotFoundError(2, "No such file", "/x"), 3),
        (PermissionError(13, "Permission denied", "/x"), 3),
        (CheckpointError("x"), 5),
        (ReleaseError("x"), 6),
        (ReleaseNotFoundError("x"), 6),
        (TrainingError("x"), 7),
        (TrainingInterrupted("x"), 130),
        (KeyboardInterrupt(), 130),
        (ModuleNotFoundError("No module named 'ray'", name="ray"), 2),
        (ModuleNotFoundError("No module named 'anycontrast.x'", name="anycontrast.x"), 1),
        (ValueError("x"), 1),
        (OSError("x"), 1),
        (RuntimeError("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_its_documented_code(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


def _raise(error: BaseException) -> Callable[[], object]:
    def run() -> object:
        raise error

    return run


def test_a_users_mistake_is_one_line(capsys: Capture) -> None:
    assert guarded(_raise(ConfigError("a:\n  b\n\n  c"))) == 2
    assert capsys.readouterr().err == "anycontrast: error: a: b c\n"


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(_raise(ZeroDivisionError("x")))


def test_an_interrupted_run_says_so(capsys: Capture) -> None:
    assert guarded(_raise(KeyboardInterrupt())) == 130
    assert guarded(_raise(TrainingInterrupted("saved step 4"))) == 130
    assert capsys.readouterr().err.splitlines() == [
        "anycontrast: interrupted: stopped by the keyboard",
        "anycontrast: interrupted: saved step 4",
    ]


def test_a_missing_library_names_the_extra() -> None:
    message = message_of(ModuleNotFoundError("x", name="deepspeed"))
    assert message.startswith("the library 'deepspeed' is not installed")
    assert "anycontrast[train]" in message


def test_a_full_disk_names_the_file() -> None:
    message = message_of(OSError(28, "No space left on device", "/data/x"))
    assert message.startswith("/data/x: No space left on device; check")


def test_results_are_json_and_messages_are_not_among_them(run_copy: Path, capsys: Capture) -> None:
    for verb in ("scan", "shard", "validate", "evaluate", "export"):
        assert main([verb, str(run_copy)]) == 0
        captured = capsys.readouterr()
        assert isinstance(json.loads(captured.out), dict), verb
        assert "anycontrast: error" not in captured.err


def test_pull_and_verify_say_what_to_do_next(
    tiny_run: Config, tmp_path: Path, capsys: Capture
) -> None:
    source = tiny_run.paths.release / "segmenter"
    assert main(["pull", str(source), f"pull.cache={tmp_path}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["predict"] == f"anycontrast predict {printed['release']} STUDY_DIR OUT"
    assert main(["verify", printed["release"]]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 4


def test_the_stock_unetr_head_goes_from_finetuning_to_a_prediction(
    run_copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.rmtree(run / "finetune")
    channels = "finetune.segmenter.contrasts=[DWI,ADC,FLAIR]"
    for verb in ("finetune", "evaluate", "export"):
        words = [verb, str(run_copy), "finetune.segmenter.head=unetr", channels]
        assert main(words) == 0, capsys.readouterr().err
    report = json.loads((run / "report" / "dice_by_subset.json").read_text())
    assert {row["subset"] for row in report["rows"]} == {"DWI", "ADC", "DWI+ADC"}
    release = run / "release" / "segmenter"
    facts = json.loads((release / "config.json").read_text())
    assert facts["segmenter"]["head"] == "unetr"
    assert json.loads((release / "eval.json").read_text()) == report
    study, out = run / "source" / "sub-0001" / "ses-1" / "dwi", tmp_path / "out"
    capsys.readouterr()
    assert main(["predict", str(release), str(study), str(out)]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["contrasts_used"]) == ["ADC", "DWI"]
    assert sorted(p.name for p in out.iterdir()) == [
        *("core.nii.gz", "lesion.nii.gz", "prediction.json"),
    ]


def _not_in_a_plain_install() -> set[str]:
    """Modules installed here that `pip install anycontrast`, without an extra, does not bring."""
    wanted, waiting = set(), ["anycontrast"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in wanted and (found := list(metadata.distributions(name=name))):
            wanted.add(name)
            needs = map(Requirement, found[0].requires or ())
            waiting += [r.name for r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
    owners = metadata.packages_distributions().items()
    return {module for module, names in owners if not wanted & set(map(canonicalize_name, names))}


def test_a_release_is_used_without_the_extras(tiny_run: Config, tmp_path: Path) -> None:
    release = tiny_run.paths.release / "segmenter"
    study = tiny_run.paths.source / "sub-0001" / "ses-1" / "dwi"
    hidden = _not_in_a_plain_install()
    assert hidden >= {"ray", "deepspeed", "webdataset", "tensorboard", "matplotlib", "nilearn"}
    words = [",".join(hidden), str(release), str(study), str(tmp_path)]
    command = [sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 0] refused ray"], done.stderr
    assert (tmp_path / "out" / "lesion.nii.gz").is_file()


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path, capsys: Capture) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert main(["verify", str(odd)]) == 6
    assert "no release in" in capsys.readouterr().err


def test_help_and_usage_errors_load_no_training_stack() -> None:
    code = """
import sys
from anycontrast.cli import main
codes = [main(["--help"]), main(["pull"]), main(["predict", "a"]), main(["scn"])]
print(codes, [m for m in ("torch", "ray", "deepspeed") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2, 2, 2] []"
