"""The whole way on embedded data: `make demo`, or `python recipes/demo.py [key=value ...]`.

Each step is the command a user would type; it is printed before it runs. Nothing here knows more
than the command line does.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from anycontrast.cli import main
from anycontrast.training.config import Config, load_config

CONFIG = os.path.relpath(Path(__file__).parent / "configs" / "demo.yaml")


def steps(config: Config, overrides: list[str]) -> Iterator[list[str]]:
    """Yield the command lines of the demo, in order; later ones name what earlier ones made."""
    run, common = config.paths, [CONFIG, *overrides]
    for verb in ("scan", "shard", "validate", "report", "plan", "pretrain", "finetune"):
        yield [verb, *common]
    yield ["finetune", *common, "finetune.from_scratch=true"]
    for verb in ("evaluate", "export"):
        yield [verb, *common]
    cache = run.run / "pulled"
    yield ["pull", str(run.release / "segmenter"), f"pull.cache={cache}"]
    pulled = max(cache.glob("*segmenter*"), key=lambda folder: folder.stat().st_mtime)
    # An ordinary folder of NIfTI files, as any other team has.
    study = min(folder for folder in run.source.glob("sub-*/ses-*") if folder.is_dir())
    yield ["predict", str(pulled), str(study), str(run.report / "prediction")]


def summary(config: Config, seconds: float) -> str:
    """Say what was made, where it lies, and what to try next."""
    run = config.paths
    lines = (run.pretrain / "metrics.jsonl").read_text().splitlines()
    losses = [float(json.loads(line)["loss"]) for line in lines]
    table = (run.report / "dice_by_subset.md").read_text().strip()
    here = Path(os.path.relpath(Path(sys.executable).parent))
    return "\n".join(
        [
            "",
            table,
            "",
            f"Done in {seconds:.0f} s. Everything lies under {run.run}/",
            f"  data            {run.report / 'dataset.html'}",
            f"  loss            {losses[0]:.3f} -> {losses[-1]:.3f}: {run.report / 'loss.png'}",
            f"  reconstruction  {run.report / 'reconstruction.png'}",
            f"  Dice by subset  {run.report / 'dice_by_subset.png'} (the table above: .md, .csv)",
            f"  releases        {run.release / 'encoder'}, {run.release / 'segmenter'}",
            f"  prediction      {run.report / 'prediction'}",
            "",
            "Try next:",
            f"  {here / 'tensorboard'} --logdir {run.run}",
            f"  {here / 'anycontrast'} view 0 {CONFIG}",
            f"  {here / 'anycontrast'} pretrain {CONFIG} name=mine pretrain.steps=500",
        ]
    )


def run_demo(overrides: list[str]) -> int:
    """Run every step; stop at the first that fails and return its exit code."""
    start_s = time.monotonic()
    config = load_config(Path(CONFIG), overrides)
    for words in steps(config, overrides):
        print(f"\n$ anycontrast {shlex.join(words)}", flush=True)
        if code := main(words):
            return code
    print(summary(config, time.monotonic() - start_s))
    return 0


if __name__ == "__main__":
    sys.exit(run_demo(sys.argv[1:]))
