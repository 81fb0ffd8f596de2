"""The command line: `anycontrast VERB config.yaml key=value ...`.

Exit codes: 0 done; 1 a bug of ours (with a traceback); 2 configuration or usage; 3 data (a study,
the manifest or a shard); 5 checkpoint; 6 release; 7 training or the cluster; 130 interrupted.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anycontrast import __version__
from anycontrast.log import setup_logging

logger = logging.getLogger(__name__)

_BUG, _CONFIG, _DATA, _CHECKPOINT, _RELEASE, _TRAINING, _INTERRUPTED = 1, 2, 3, 5, 6, 7, 130


@dataclass(frozen=True)
class Verb:
    """One word of the command line."""

    usage: str
    help: str
    run: Callable[[list[str], list[str]], object]
    """Called with the positional words and the `key=value` words."""


class UsageError(ValueError):
    """The words of the command line do not fit the verb."""


def _words(words: list[str], names: str) -> list[str]:
    wanted = names.split()
    if len(words) != len(wanted):
        raise UsageError(f"expected {names}, got {' '.join(words) or 'nothing'}")
    return words


def _stage(name: str) -> Callable[[list[str], list[str]], object]:
    def run(words: list[str], overrides: list[str]) -> object:
        from anycontrast import stages
        from anycontrast.training.config import load_config

        if len(words) > 1:
            raise UsageError(f"expected one config file and key=value words, got {' '.join(words)}")
        config = load_config(Path(words[0]) if words else None, overrides)
        return getattr(stages, name)(config)

    return run


def _validate(words: list[str], overrides: list[str]) -> object:
    from anycontrast.training.config import load_config
    from anycontrast_datasets.manifest import read_manifest
    from anycontrast_datasets.store.reader import open_store
    from anycontrast_datasets.study import ShardError

    config = load_config(Path(words[0]) if words else None, overrides)
    studies = read_manifest(config.paths.manifest / "manifest.parquet")
    problems = open_store(config.paths.shards).verify()
    if problems:
        raise ShardError("; ".join(problems))
    return {"studies": len(studies), "shards": "every byte as written"}


def _pull(words: list[str], overrides: list[str]) -> object:
    from anycontrast.release.hub import pull
    from anycontrast.training.config import load_config

    (source,) = _words(words, "PATH_OR_URL")
    path = pull(source, load_config(None, overrides).pull)
    return {"release": str(path), "load": f'anycontrast.load_pretrained("{path}")'}


def _verify(words: list[str], overrides: list[str]) -> object:
    from anycontrast.release.hub import verify_release

    (release,) = _words(words, "RELEASE")
    if overrides:
        raise UsageError(f"verify takes no options, got {' '.join(overrides)}")
    manifest = verify_release(Path(release))
    return {"files": len(manifest["files"]), "state": "every byte as released"}


def _predict(words: list[str], overrides: list[str]) -> object:
    from anycontrast.release.predict import run_predict
    from anycontrast.training.config import load_config

    release, study_dir, out = _words(words, "RELEASE STUDY_DIR OUT")
    config = load_config(None, overrides).predict
    return run_predict(Path(release), Path(study_dir), Path(out), config)


VERBS = {
    "scan": Verb(
        "[CONFIG] [key=value ...]", "source studies -> manifest and ledger", _stage("scan")
    ),
    "shard": Verb("[CONFIG] [key=value ...]", "manifest -> shards", _stage("shard")),
    "validate": Verb("[CONFIG] [key=value ...]", "check manifest and every shard byte", _validate),
    "pretrain": Verb(
        "[CONFIG] [key=value ...]", "shards -> pretrained encoder", _stage("pretrain")
    ),
    "finetune": Verb("[CONFIG] [key=value ...]", "encoder -> segmenter", _stage("finetune")),
    "evaluate": Verb("[CONFIG] [key=value ...]", "Dice per contrast subset", _stage("evaluate")),
    "export": Verb("[CONFIG] [key=value ...]", "checkpoints -> releases", _stage("export")),
    "pull": Verb("PATH_OR_URL [key=value ...]", "fetch and verify a release", _pull),
    "verify": Verb("RELEASE", "check every byte of a release", _verify),
    "predict": Verb("RELEASE STUDY_DIR OUT [key=value ...]", "segment one study", _predict),
}


def _help() -> str:
    lines = [f"anycontrast {__version__}", "", "usage: anycontrast VERB ...", ""]
    lines += [f"  {name:9} {verb.usage:40} {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [*lines, "", "Exit codes: " + (__doc__ or "").split("Exit codes: ")[1].strip()]
    )


def exit_code_of(error: BaseException) -> int:
    """Which documented exit code an error stands for."""
    from anycontrast.release.hub import ReleaseError
    from anycontrast.training.checkpoint import CheckpointError
    from anycontrast.training.config import ConfigError
    from anycontrast.training.loop import TrainingError
    from anycontrast_datasets.study import StudyError

    table: tuple[tuple[type[BaseException], int], ...] = (
        (UsageError, _CONFIG),
        (ConfigError, _CONFIG),
        (CheckpointError, _CHECKPOINT),
        (ReleaseError, _RELEASE),
        (TrainingError, _TRAINING),
        (StudyError, _DATA),
        (KeyboardInterrupt, _INTERRUPTED),
    )
    return next((code for kind, code in table if isinstance(error, kind)), _BUG)


def guarded(run: Callable[[], object]) -> int:
    """Run a verb or a recipe: user mistakes end in one line, bugs of ours in a traceback.

    Returns:
        The exit code; what `run` returned is printed as JSON on standard output.
    """
    try:
        result = run()
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_of(error)
        if code == _BUG:
            raise
        print(
            f"anycontrast: error: {error}" if code != _INTERRUPTED else "interrupted",
            file=sys.stderr,
        )
        return code
    if result is not None:
        print(json.dumps(result, indent=2, default=str))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help())
        return 0 if words else _CONFIG
    if words[0] == "--version":
        print(__version__)
        return 0
    setup_logging()
    name, *rest = words
    if name not in VERBS:
        import difflib

        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else f"; verbs: {', '.join(VERBS)}"
        print(f"anycontrast: error: no verb {name!r}{hint}", file=sys.stderr)
        return _CONFIG
    verb = VERBS[name]
    if any(word in {"-h", "--help"} for word in rest):
        print(f"usage: anycontrast {name} {verb.usage}\n{verb.help}")
        return 0
    overrides = [word for word in rest if "=" in word and not Path(word).exists()]
    positional = [word for word in rest if word not in overrides]
    return guarded(lambda: verb.run(positional, overrides))


if __name__ == "__main__":
    sys.exit(main())
