"""Export checkpoints as releases: the encoder of the pretraining, the finetuned segmenter.

A release carries what another team needs to use it and to judge it: weights as safetensors, the
architecture, how studies must be prepared, which contrasts were seen and how often, the licence,
and the score it should reach. The decoder stays behind: it is built to recall training images.
"""

import json
import logging
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast import __version__
from anycontrast.release.card import write_card
from anycontrast.release.files import write_manifest, write_synced

if TYPE_CHECKING:
    from torch import Tensor

    from anycontrast.training.config import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What a release says of itself beside what the run knows."""

    name: str | None = None
    """Release name; None takes the run's name."""
    license: str = "Apache-2.0"
    """SPDX identifier of the weights' licence; the data's terms may demand another one."""
    license_file: str | None = None
    """Text of that licence, copied into the release; required unless the SPDX name says enough."""
    description: str = ""
    """One paragraph for the card."""


def run_export(config: "Config") -> list[Path]:
    """Export the newest pretraining checkpoint and, if there is one, the best finetuned segmenter.

    Returns:
        The release folders, `release/encoder` first.

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    from anycontrast.training.checkpoint import CheckpointError, latest

    newest = latest(config.paths.pretrain / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"export: no valid checkpoint under {config.paths.pretrain}; run `anycontrast pretrain`"
        )
    made = [_export(config, newest.path, config.paths.release / "encoder", score=None)]
    segmenter = _best_segmenter(config.paths.finetune / "pretrained")
    if segmenter is not None:
        made.append(
            _export(config, segmenter, config.paths.release / "segmenter", score=_score(config))
        )
    for path in made:
        logger.info("released %s", path)
    return made


def _best_segmenter(folder: Path) -> Path | None:
    best = folder / "best.json"
    if not best.is_file():
        return None
    return folder / "checkpoints" / str(json.loads(best.read_text())["checkpoint"])


def _score(config: "Config") -> Any:
    path = config.paths.report / "dice_by_subset.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _export(config: "Config", checkpoint: Path, out: Path, *, score: Any) -> Path:
    """Write one release beside its place, then swap it in."""
    from anycontrast.training.checkpoint import load_weights

    tensors, state = load_weights(checkpoint)
    kind = "encoder" if state["kind"] == "amae" else "segmenter"
    facts = _facts(config, state, kind)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_weights(temporary / "model.safetensors", _released(tensors, kind))
    write_synced(temporary / "config.json", json.dumps(facts, indent=2, sort_keys=True).encode())
    if score is not None:
        write_synced(temporary / "eval.json", json.dumps(score, indent=2, sort_keys=True).encode())
    if config.export.license_file is not None:
        shutil.copyfile(config.export.license_file, temporary / "LICENSE")
    write_card(temporary / "README.md", facts, score, config.export.description)
    write_manifest(temporary, {"name": facts["name"], "kind": kind, "license": facts["license"]})
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)
    return out


def _released(tensors: "dict[str, Tensor]", kind: str) -> "dict[str, Tensor]":
    if kind == "segmenter":
        return tensors
    return {
        name.removeprefix("encoder."): value
        for name, value in tensors.items()
        if name.startswith("encoder.")
    }


def _write_weights(path: Path, tensors: "dict[str, Tensor]") -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def _facts(config: "Config", state: dict[str, Any], kind: str) -> dict[str, Any]:
    """Everything `config.json` holds."""
    model_config = state["model_config"]
    is_segmenter = kind == "segmenter"
    return {
        "format_version": 1,
        "name": f"{config.export.name or config.name}-{kind}",
        "kind": kind,
        "anycontrast_version": __version__,
        "model": model_config["amae"] if is_segmenter else model_config,
        "segmenter": model_config["segmenter"] if is_segmenter else None,
        "prepare": asdict(config.prepare),
        "intensity": "z-score over each volume's foreground, clipped to percentiles 0.5 and 99.5",
        "orientation": "RAS+, every contrast on the reference contrast's grid",
        "contrasts_seen": _contrasts_seen(config),
        "training": {
            "step": state["step"],
            "seed": config.seed,
            "from_scratch": bool(is_segmenter and state.get("from_scratch", False)),
            "dataset": config.scan.dataset,
            "dataset_fingerprint": _fingerprint(config),
        },
        "license": config.export.license,
    }


def _contrasts_seen(config: "Config") -> dict[str, int]:
    from anycontrast_datasets.store.reader import open_store

    store = open_store(config.paths.shards)
    seen = Counter(c for r in store.records if r.split == "train" for c in r.contrasts)
    return dict(sorted(seen.items()))


def _fingerprint(config: "Config") -> str:
    from anycontrast_datasets.store.reader import open_store

    return open_store(config.paths.shards).fingerprint
