"""Checkpoints: whole or absent, verified before use, never overwritten, no pickle.

    <run>/checkpoints/step-00000100/
      model.safetensors                 full float32 weights
      state.json                        kind, model_config, step, stream position, engine, versions
      engine/optimizer-00000-of-00002.safetensors   AdamW moments of every second parameter, whole
      engine/rng-00000.json             generator states of rank 0
      manifest.json                     size and sha256 of every file above; written last

Every rank writes into `step-00000100.tmp-<id>`, fsyncs and hashes its files; rank 0 writes the
manifest, fsyncs, renames the folder and fsyncs its parent. "Newest" is found by scanning and
verifying manifests. Moments are stored per parameter, so another world size or ZeRO stage can go
on from the same folder.
"""

import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anycontrast.training.engine import Engine
from anycontrast.training.process_group import from_rank_0, gather_objects, rank, world_size
from anycontrast.training.rng import read_rng, write_rng
from anycontrast_datasets.files import sha256_file, sync_path

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"
_OPTIMIZER = "optimizer-{:05d}-of-{:05d}.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found whole, or used for this run."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A verified checkpoint."""

    path: Path
    step: int
    """Optimiser steps done."""
    state: dict[str, Any]
    """`state.json`."""


def save(
    root: Path,
    engine: Engine,
    *,
    step: int,
    state: Mapping[str, Any],
    keep_last: int = 0,
    pinned: frozenset[str] = frozenset(),
) -> Path:
    """Write the checkpoint of `step` and prune older ones. Every rank calls it alike.

    Args:
        root: folder of the run's checkpoints, shared by all ranks.
        engine: holds weights and moments.
        step: optimiser steps done.
        state: JSON, stored in `state.json` beside what this function adds.
        keep_last: newest checkpoints to keep; 0 keeps all.
        pinned: names never pruned.

    Returns:
        The checkpoint's folder. One that exists already is left as it is.

    Raises:
        CheckpointError: on every rank, when any rank cannot write its part.
    """
    final = root / f"step-{step:08d}"
    if from_rank_0(final.exists):
        return final
    temporary = from_rank_0(lambda: _make_temporary(final))
    weights, moments = engine.full_state_dict(), engine.optimizer_state()
    facts = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size(),
        "zero_stage": engine.stage,
        "applied_steps": engine.applied_steps(),
        "skipped_steps": engine.skipped_steps,
        **state,
    }
    own = _attempt(lambda: _write_own(temporary, weights, moments, facts), f"writing {final}")
    hashed = [entry for part in own for entry in part]
    _attempt(lambda: _commit(temporary, final, hashed) if rank() == 0 else None, f"naming {final}")
    if rank() == 0:
        prune(root, keep_last=keep_last, pinned=pinned | {final.name})
    return final


def latest(root: Path) -> CheckpointInfo | None:
    """Return the newest checkpoint whose every file is as it was written, or None.

    A damaged one is passed over with a warning that names the file. Reads every byte.

    Args:
        root: folder of the run's checkpoints.
    """
    for path in reversed(_folders(root)):
        try:
            return _verified(path)
        except CheckpointError as error:
            logger.warning("%s; trying the checkpoint before it", error)
    return None


def find_resumable(root: Path) -> CheckpointInfo | None:
    """Return what `latest` does, and rename newer, damaged checkpoints out of the way.

    Call it while holding the run folder's lock: training goes on from an earlier step and will
    write those steps anew.

    Raises:
        CheckpointError: there are checkpoints and none is whole; training does not start over
            silently.
    """
    found = latest(root)
    damaged = [path for path in _folders(root) if found is None or path.name > found.path.name]
    if found is None and damaged:
        raise CheckpointError(
            f"resuming from {root}: none of its {len(damaged)} checkpoints is whole (the log names "
            "the files); restore one, or remove the folder to start over"
        )
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
        path.rename(aside)
        logger.warning("set %s aside as %s", path.name, aside.name)
    return found


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the full float32 weights (CPU) and `state.json` of one checkpoint, verified first.

    Args:
        path: a checkpoint folder (`step-...`), or a folder of them, whose newest is taken.

    Raises:
        CheckpointError: there is none, or a file is missing or not as written.
    """
    if not (path / _MANIFEST).is_file() and (found := latest(path)) is not None:
        info = found
    else:
        info = _verified(path)
    return _read_tensors(info.path / "model.safetensors"), info.state


def load_model(info: CheckpointInfo, model: nn.Module) -> None:
    """Load the weights of a verified checkpoint.

    Raises:
        CheckpointError: they are not of this model.
    """
    try:
        model.load_state_dict(_read_tensors(info.path / "model.safetensors"), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"resuming from {info.path}: its weights are not of the configured model "
            f"({str(error).splitlines()[-1].strip()}); use the model configuration of that run, or "
            "another run name"
        ) from error


def load_optimizer(info: CheckpointInfo, engine: Engine) -> None:
    """Give the engine the moments of a verified checkpoint, whatever wrote it.

    Raises:
        CheckpointError: the moments do not cover the model.
    """
    moments: dict[str, Tensor] = {}
    parts = int(info.state["world_size"])
    for part in range(parts):
        moments |= _read_tensors(info.path / "engine" / _OPTIMIZER.format(part, parts))
    try:
        engine.load_optimizer_state(moments, int(info.state["applied_steps"]))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"resuming from {info.path}: optimiser state does not fit the model: {error}; the "
            "model configuration has changed, start another run with pretrain.init_from"
        ) from error
    engine.skipped_steps = int(info.state.get("skipped_steps", 0))
    own = info.path / "engine" / f"rng-{rank():05d}.json"
    if parts == world_size() and own.is_file():
        read_rng(own)


def prune(root: Path, *, keep_last: int, pinned: frozenset[str] = frozenset()) -> None:
    """Remove all but the newest `keep_last` checkpoints and the pinned ones; 0 removes none.

    A folder that cannot be removed is reported and left.
    """
    if keep_last == 0:
        return
    for path in _folders(root)[:-keep_last]:
        if path.name not in pinned:
            _remove(path)


def sweep(root: Path) -> None:
    """Remove what a killed save left behind. Call it while holding the run folder's lock."""
    for path in sorted(root.glob("step-*.tmp-*")) + sorted(root.glob("step-*.removed-*")):
        logger.warning("removing %s, left by a save that did not finish", path)
        shutil.rmtree(path, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def _make_temporary(final: Path) -> Path:
    temporary = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    try:
        (temporary / "engine").mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"writing {final}: {error}") from error
    return temporary


def _attempt(do: Callable[[], Any], what: str) -> list[Any]:
    """Do it on every rank; if any fails, raise on all of them. Returns every rank's result."""
    problem, result = None, None
    try:
        result = do()
    except (OSError, SafetensorError) as error:
        problem = f"rank {rank()}: {type(error).__name__}: {error}"
    outcomes = gather_objects((problem, result))
    problems = [text for text, _ in outcomes if text is not None]
    if problems:
        raise CheckpointError(
            f"{what} failed ({'; '.join(problems)}); earlier checkpoints are untouched, free space "
            "or fix the storage and run again"
        )
    return [value for _, value in outcomes]


Entry = tuple[str, int, str]
"""Path inside the checkpoint, bytes, sha256."""


def _write_own(
    temporary: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> list[Entry]:
    """Write and fsync the files of this rank; return their hashes."""
    engine = temporary / "engine"
    written = [engine / _OPTIMIZER.format(rank(), world_size()), engine / f"rng-{rank():05d}.json"]
    save_file(dict(moments), written[0])
    write_rng(written[1])
    if rank() == 0:
        written += [temporary / "model.safetensors", temporary / "state.json"]
        save_file(_separate(weights), written[2])
        written[3].write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
    for path in written:
        sync_path(path)
    return [(str(p.relative_to(temporary)), p.stat().st_size, sha256_file(p)) for p in written]


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tied weights storage of their own: safetensors refuses shared memory."""
    return {name: tensor.clone() for name, tensor in weights.items()}


def _commit(temporary: Path, final: Path, entries: list[Entry]) -> None:
    """Write the manifest, then make the checkpoint visible under its name."""
    files = {name: {"bytes": size, "sha256": digest} for name, size, digest in sorted(entries)}
    manifest = temporary / _MANIFEST
    content = {"files": files, "sha256": _digest(files)}
    manifest.write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in (manifest, temporary / "engine", temporary):
        sync_path(path)
    temporary.rename(final)
    sync_path(final.parent)


def _verified(path: Path) -> CheckpointInfo:
    """Check every file of a checkpoint against its manifest."""
    try:
        content = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = content["files"]
        if content["sha256"] != _digest(files) or not {"model.safetensors", "state.json"} <= set(
            files
        ):
            raise ValueError("manifest.json is not what was written")
        for name, expected in files.items():
            _check_file(path, name, expected)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: manifest.json or state.json is missing or unreadable "
            f"({type(error).__name__}: {error}); use another checkpoint"
        ) from error
    return CheckpointInfo(path, step, state)


def _check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        problem = "is missing"
    elif path.stat().st_size != expected["bytes"]:
        problem = f"has {path.stat().st_size} bytes, {expected['bytes']} were written"
    elif sha256_file(path) != expected["sha256"]:
        problem = "is not what was written (sha256 differs)"
    else:
        return
    raise CheckpointError(f"checkpoint {folder}: {name} {problem}; use another checkpoint")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a verified checkpoint; the only reader of stored tensors."""
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"reading {path}: {error}; use another checkpoint") from error


def _remove(path: Path) -> None:
    """Take a checkpoint out of sight first, so that no half of one is ever seen."""
    hidden = path.with_name(f"{path.name}.removed-{secrets.token_hex(4)}")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("pruning %s failed: %s", path, error)


def _digest(files: Mapping[str, Any]) -> str:
    """The manifest's own checksum."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
