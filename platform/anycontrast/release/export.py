"""Export checkpoints as releases: the encoder of the pretraining, the finetuned segmenter.

A release carries what another team needs to use it and to judge it: weights as safetensors, the
architecture, how studies must be prepared, which contrasts were seen and how often, the licence,
and the score it should reach. The decoder stays behind: it is built to recall training images.
The same checkpoints give the same bytes; a release that is there already is left alone.
"""

import json
import logging
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast import __version__
from anycontrast.release.card import write_card
from anycontrast.release.errors import ReleaseError
from anycontrast.release.files import MANIFEST, verify_release, write_manifest, write_synced

if TYPE_CHECKING:
    from torch import Tensor

    from anycontrast.training.config import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What a release says of itself beside what the run knows."""

    name: str | None = None
    """Release name, letters, digits, `.`, `_` and `-`; None takes the run's name."""
    license: str = "Apache-2.0"
    """SPDX identifier of the weights' licence; the data's terms may demand another one."""
    license_file: str | None = None
    """Text of that licence, copied into the release as LICENSE; None leaves it out."""
    description: str = ""
    """One paragraph for the card."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                "export.name must be letters, digits, '.', '_' or '-', starting with a letter or "
                f"digit, got {self.name!r}"
            )
        if not re.fullmatch(r"[A-Za-z0-9.+-]+", self.license):
            raise ValueError(
                "export.license must be an SPDX identifier such as Apache-2.0 or CC-BY-NC-4.0, got "
                f"{self.license!r}; use LicenseRef-NAME and export.license_file for another one"
            )


def run_export(config: "Config") -> list[Path]:
    """Export the newest pretraining checkpoint and, if there is one, the best finetuned segmenter.

    Returns:
        The release folders, `release/encoder` first.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: the licence file is missing.
        ShardError: the shards, which say what was seen, are gone.
    """
    from anycontrast.training.checkpoint import CheckpointError, latest
    from anycontrast.training.config import ConfigError

    license_file = config.export.license_file
    if license_file is not None and not Path(license_file).is_file():
        raise ConfigError(f"export.license_file: no file {license_file}; correct the path")
    folder = config.paths.pretrain / "checkpoints"
    newest = latest(folder)
    if newest is None:
        raise CheckpointError(
            f"export: no whole checkpoint in {folder} (a damaged one is named in the log); run "
            "`anycontrast pretrain` with the same config"
        )
    made = [_export(config, newest.path, config.paths.release / "encoder", score=None)]
    segmenter = _best_segmenter(config)
    if segmenter is not None:
        score = _score(config, segmenter)
        made.append(_export(config, segmenter, config.paths.release / "segmenter", score=score))
    return made


def _best_segmenter(config: "Config") -> Path | None:
    """The finetuned checkpoint to release: pretrained before scratch."""
    from anycontrast.evaluation.evaluate import find_finetuned

    found = find_finetuned(config.paths.finetune)
    if "pretrained" not in found and "scratch" in found:
        logger.warning("releasing the segmenter trained from scratch: no other was finetuned")
    return found.get("pretrained", found.get("scratch"))


def _score(config: "Config", checkpoint: Path) -> Any:
    """What was measured on exactly this checkpoint; another one's score is left out."""
    from anycontrast.evaluation.evaluate import checkpoint_digest

    path = config.paths.report / "dice_by_subset.json"
    if not path.is_file():
        return None
    score = json.loads(path.read_text(encoding="utf-8"))
    if checkpoint_digest(checkpoint) not in score.get("digests", {}).values():
        logger.warning(
            "%s measured another checkpoint than %s, so the release carries no score; run "
            "`anycontrast evaluate` again before the export",
            path,
            checkpoint,
        )
        return None
    return score


def _export(config: "Config", checkpoint: Path, out: Path, *, score: Any) -> Path:
    """Write one release beside its place, then swap it in."""
    from anycontrast.training.checkpoint import load_weights

    tensors, state = load_weights(checkpoint)
    kind = "encoder" if state["kind"] == "amae" else "segmenter"
    facts = _facts(config, state, kind)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(temporary / "model.safetensors", _released(tensors, kind))
        _write_json(temporary / "config.json", facts)
        if score is not None:
            _write_json(temporary / "eval.json", score)
        if config.export.license_file is not None:
            write_synced(temporary / "LICENSE", Path(config.export.license_file).read_bytes())
        write_card(temporary / "README.md", facts, score, config.export.description)
        write_manifest(
            temporary, {"name": facts["name"], "kind": kind, "license": facts["license"]}
        )
        _swap(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _swap(temporary: Path, out: Path) -> None:
    """Put a finished release in its place; an equal one that is whole stays."""
    if _is_same(temporary, out):
        logger.info("reused %s: the same release is there already", out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    logger.info("released %s", out)


def _is_same(new: Path, old: Path) -> bool:
    try:
        verify_release(old)
    except ReleaseError:
        return False
    return (new / MANIFEST).read_bytes() == (old / MANIFEST).read_bytes()


def _released(tensors: "dict[str, Tensor]", kind: str) -> "dict[str, Tensor]":
    if kind == "segmenter":
        return tensors
    return {
        name.removeprefix("encoder."): value
        for name, value in tensors.items()
        if name.startswith("encoder.")
    }


def _write_weights(path: Path, tensors: "dict[str, Tensor]") -> None:
    from safetensors.torch import save

    write_synced(path, save({name: value.contiguous() for name, value in tensors.items()}))


def _write_json(path: Path, values: Any) -> None:
    write_synced(path, json.dumps(values, indent=2, sort_keys=True).encode())


def _check_faces(dataset: dict[str, Any], spdx: str) -> None:
    """Refuse an open licence for a model that has seen faces: it may recall them."""
    if dataset.get("shard", {}).get("faces") == "allow" and not spdx.startswith("LicenseRef-"):
        raise ReleaseError(
            f"export: the shards were made with shard.faces=allow, so the model has seen faces and "
            f"may not be released as {spdx}; set export.license=LicenseRef-NAME and "
            "export.license_file for terms of your own, or train on shards without faces"
        )


def _facts(config: "Config", state: dict[str, Any], kind: str) -> dict[str, Any]:
    """Everything `config.json` holds, from the checkpoint and the shards rather than the config."""
    from anycontrast.shards import open_shards, shards_location
    from anycontrast_datasets.store.reader import describe_store

    store = open_shards(config)
    dataset = describe_store(shards_location(config))
    _check_faces(dataset, config.export.license)
    seen = Counter(c for r in store.records if r.split == "train" for c in r.contrasts)
    model_config, trained = state["model_config"], state["config"]
    is_segmenter = kind == "segmenter"
    return {
        "format_version": 1,
        "name": f"{config.export.name or config.name}-{kind}",
        "kind": kind,
        "anycontrast_version": __version__,
        "model": model_config["amae"] if is_segmenter else model_config,
        "segmenter": model_config["segmenter"] if is_segmenter else None,
        "prepare": dataset["prepare"],
        "intensity": "z-score over each volume's foreground, clipped to percentiles 0.5 and 99.5",
        "orientation": "RAS+, every contrast on the reference contrast's grid",
        "contrasts_seen": dict(sorted(seen.items())),
        "training": {
            "step": state["step"],
            "seed": trained["seed"],
            "from_scratch": bool(is_segmenter and state.get("from_scratch", False)),
            "pretrained_encoder": state.get("origin"),
            "dataset": trained["scan"]["dataset"] or trained["scan"]["source"],
            "dataset_fingerprint": _fingerprint(store.fingerprint, state),
        },
        "license": config.export.license,
    }


def _fingerprint(found: str, state: dict[str, Any]) -> str:
    """The data's fingerprint, which must be that of the data the model saw (`NAME:part`)."""
    trained_on = str(state.get("stream", {}).get("fingerprint", found)).partition(":")[0]
    if trained_on != found:
        raise ReleaseError(
            f"export: the model was trained on shards {trained_on[:16]}, the run folder now holds "
            f"{found[:16]}; put those shards back, or train again, so that the release can say "
            "what was seen"
        )
    return found
