"""The verbs of the command line: what each takes, what it calls, which settings it reads."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Verb:
    """One word of the command line."""

    usage: str
    help: str
    run: Callable[[list[str], list[str]], object]
    """Called with the positional words and the `key=value` words."""
    sections: tuple[str, ...] = ()
    """Parts of the configuration it reads, for its help."""


class UsageError(ValueError):
    """The words of the command line do not fit the verb."""


def _words(words: list[str], names: str) -> list[str]:
    wanted = names.split()
    if len(words) != len(wanted):
        raise UsageError(f"expected {names}, got {' '.join(words) or 'nothing'}")
    return words


def _config_file(words: list[str]) -> Path | None:
    if len(words) > 1:
        raise UsageError(
            f"expected at most one config file and key=value words, got {' '.join(words)}"
        )
    return Path(words[0]) if words else None


def _stage(name: str) -> Callable[[list[str], list[str]], object]:
    def run(words: list[str], overrides: list[str]) -> object:
        path = _config_file(words)
        from anycontrast import stages
        from anycontrast.training.config import load_config

        return getattr(stages, name)(load_config(path, overrides))

    return run


def _validate(words: list[str], overrides: list[str]) -> object:
    path = _config_file(words)
    from anycontrast.shards import check_manifest, open_shards, shown_location
    from anycontrast.training.config import load_config
    from anycontrast_datasets.manifest import read_manifest
    from anycontrast_datasets.study import ShardError

    config = load_config(path, overrides)
    studies = read_manifest(config.paths.manifest / "manifest.parquet")
    check_manifest(config)
    store = open_shards(config)
    if problems := store.verify():
        raise ShardError(f"validating {shown_location(config)}: {'; '.join(problems)}")
    return {
        "studies": len(studies),
        "sharded": len(store.records),
        "shards": "every byte as written",
    }


def _pull(words: list[str], overrides: list[str]) -> object:
    (source,) = _words(words, "PATH_OR_URL")
    from anycontrast.release.hub import pull
    from anycontrast.training.config import load_config

    path = pull(source, load_config(None, overrides).pull)
    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("kind")
    use = {"predict": f"anycontrast predict {path} STUDY_DIR OUT"} if kind == "segmenter" else {}
    return {"release": str(path), "load": f'anycontrast.load_pretrained("{path}")', **use}


def _verify(words: list[str], overrides: list[str]) -> object:
    (release,) = _words(words, "RELEASE")
    from anycontrast.release.hub import verify_release

    if overrides:
        raise UsageError(f"verify takes no settings, got {' '.join(overrides)}")
    manifest = verify_release(Path(release))
    return {"files": len(manifest["files"]), "state": "every byte as released"}


def _predict(words: list[str], overrides: list[str]) -> object:
    release, study_dir, out = _words(words, "RELEASE STUDY_DIR OUT")
    from anycontrast.release.predict import run_predict
    from anycontrast.training.config import load_config

    config = load_config(None, overrides)
    return run_predict(release, Path(study_dir), Path(out), config.predict)


def _data_stage(name: str) -> Callable[[list[str], list[str]], object]:
    def run(words: list[str], overrides: list[str]) -> object:
        path = _config_file(words)
        from anycontrast import data_stages
        from anycontrast.training.config import load_config

        return getattr(data_stages, name)(load_config(path, overrides))

    return run


def _report(words: list[str], overrides: list[str]) -> object:
    path = _config_file(words)
    from anycontrast.data_stages import report
    from anycontrast.training.config import load_config

    is_config = path is None or path.suffix in {".yaml", ".yml"}
    return report(load_config(path if is_config else None, overrides), None if is_config else path)


def _subject_stage(name: str) -> Callable[[list[str], list[str]], object]:
    def run(words: list[str], overrides: list[str]) -> object:
        if not words:
            raise UsageError("expected SUBJECT, got nothing")
        path = _config_file(words[1:])
        from anycontrast import data_stages
        from anycontrast.training.config import load_config

        return getattr(data_stages, name)(load_config(path, overrides), words[0])

    return run


def _view(words: list[str], overrides: list[str]) -> object:
    if not words:
        raise UsageError("expected STUDY, got nothing")
    path = _config_file(words[1:])
    from anycontrast.training.config import load_config
    from anycontrast.view import run_view

    config = load_config(path, overrides)
    return run_view(config, words[0], config.view)


def _plan(words: list[str], overrides: list[str]) -> object:
    path = _config_file(words)
    from anycontrast.data_stages import plan
    from anycontrast.training.config import load_config

    overrides, as_json = _take_json(overrides)
    result, text = plan(load_config(path, overrides))
    print(json.dumps(result, default=str) if as_json else text)
    return None


def _doctor(words: list[str], overrides: list[str]) -> object:
    path = _config_file(words)
    from anycontrast.doctor.examine import run_doctor
    from anycontrast.training.config import load_config
    from anycontrast.training.loop import TrainingError

    overrides, as_json = _take_json(overrides)
    diagnosis = run_doctor(load_config(path, overrides))
    print(json.dumps(diagnosis.to_json()) if as_json else diagnosis.text())
    if diagnosis.is_failed:
        raise TrainingError(
            f"doctor: {diagnosis.place} is not fit for training; see the lines above"
        )
    return None


def _bench(words: list[str], overrides: list[str]) -> object:
    (name,) = _words(words, "NAME")
    if name not in BENCHES:
        raise UsageError(f"no benchmark {name!r}; there are {', '.join(BENCHES)}")
    from anycontrast.training.config import load_options

    overrides, as_json = _take_json(overrides)
    module, options = _benchmark(name)
    result = module.run(load_options(options, overrides))
    if not as_json:
        return result
    print(json.dumps(result, default=str))
    return None


def _take_json(overrides: list[str]) -> tuple[list[str], bool]:
    """Take `json=true` out of the settings: the result is then one line."""
    rest = [word for word in overrides if not word.startswith("json=")]
    asked = [word.partition("=")[2] for word in overrides if word.startswith("json=")]
    if any(value not in {"true", "false"} for value in asked):
        raise UsageError(f"json must be true or false, got {asked[-1]!r}")
    return rest, asked[-1:] == ["true"]


def _benchmark(name: str) -> tuple[ModuleType, type]:
    place, _, options = BENCHES[name].partition(":")
    module = import_module(place)
    return module, getattr(module, options)


def benches() -> dict[str, type]:
    """Return name -> class of options of every benchmark."""
    return {name: _benchmark(name)[1] for name in BENCHES}


BENCHES = {
    "kernels": "anycontrast_kernels.bench.kernels:KernelsBenchConfig",
    "step": "anycontrast.bench.step:StepBenchConfig",
    "packing": "anycontrast.bench.packing:PackingBenchConfig",
    "data": "anycontrast.bench.data:DataBenchConfig",
    "stream": "anycontrast.bench.stream:StreamBenchConfig",
    "patches": "anycontrast.bench.patches:PatchesBenchConfig",
    "codecs": "anycontrast.bench.codecs:CodecsBenchConfig",
    "manifest": "anycontrast.bench.manifest:ManifestBenchConfig",
    "sharding": "anycontrast.bench.sharding:ShardingBenchConfig",
}
"""Name of a benchmark -> its module and the class of its options there."""

_RUN = "[CONFIG] [key=value ...]"
VERBS = {
    "scan": Verb(_RUN, "source studies -> manifest and ledger", _stage("scan"), ("scan",)),
    "shard": Verb(_RUN, "manifest -> shards", _stage("shard"), ("prepare", "shard")),
    "validate": Verb(_RUN, "check the manifest and every byte of the shards", _validate),
    "report": Verb(
        "[CONFIG | MANIFEST] [key=value ...]",
        "what is in a data set, as one HTML page",
        _report,
        ("report",),
    ),
    "view": Verb(
        "STUDY [CONFIG] [key=value ...]",
        "a picture of a study, its patches and mask",
        _view,
        ("view",),
    ),
    "plan": Verb(_RUN, "tokens, memory, disk, steps and hours", _plan, ("plan",)),
    "croissant": Verb(
        _RUN, "describe a data set for catalogues", _data_stage("croissant"), ("croissant",)
    ),
    "zarr": Verb(_RUN, "shards -> Zarr store with OME-NGFF images", _data_stage("zarr"), ("zarr",)),
    "withdraw": Verb(
        "SUBJECT [CONFIG] [key=value ...]",
        "remove a subject from manifest and shards",
        _subject_stage("withdraw"),
    ),
    "which-models": Verb(
        "SUBJECT [CONFIG] [key=value ...]",
        "checkpoints trained with a subject",
        _subject_stage("which_models"),
    ),
    "pretrain": Verb(
        _RUN,
        "shards -> pretrained encoder",
        _stage("pretrain"),
        ("model", "masking", "pretrain", "store", "cluster"),
    ),
    "finetune": Verb(_RUN, "encoder -> segmenter", _stage("finetune"), ("finetune",)),
    "evaluate": Verb(_RUN, "Dice per contrast subset", _stage("evaluate"), ("evaluate",)),
    "export": Verb(_RUN, "checkpoints -> releases", _stage("export"), ("export",)),
    "pull": Verb("PATH_OR_URL [key=value ...]", "fetch and verify a release", _pull, ("pull",)),
    "verify": Verb("RELEASE", "check every byte of a release", _verify),
    "predict": Verb(
        "RELEASE STUDY_DIR OUT [key=value ...]",
        "segment the study in a folder of NIfTI files",
        _predict,
        ("predict",),
    ),
    "doctor": Verb(
        "[CONFIG] [key=value ... json=true]",
        "is this cluster or machine fit for training",
        _doctor,
        ("cluster", "store"),
    ),
    "bench": Verb("NAME [key=value ...]", "measure: kernels, step, data, stream, ...", _bench),
}
