"""The whole way on embedded data: `make demo`, or `python recipes/demo.py [key=value ...]`.

Each step is the command a user would type; it is printed before it runs. Nothing here knows more
than the command line does.
"""

import csv
import json
import sys
import time
from pathlib import Path

from anycontrast.cli import main
from anycontrast.training.config import Config, load_config

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def steps(config: Config, overrides: list[str]) -> list[list[str]]:
    """Return the command lines of the demo, in order."""
    run, common = config.paths, [str(CONFIG), *overrides]
    # Any study of the source will do; the first one shows that the input is an ordinary folder.
    study = sorted(p for p in run.source.glob("sub-*/ses-*") if p.is_dir())
    return [
        ["scan", *common],
        ["shard", *common],
        ["validate", *common],
        ["pretrain", *common],
        ["finetune", *common],
        ["finetune", *common, "finetune.from_scratch=true"],
        ["evaluate", *common],
        ["export", *common],
        ["pull", str(run.release / "segmenter"), f"pull.cache={run.run / 'pulled'}"],
        *(
            ["predict", str(release), str(study[0]), str(run.report / "prediction")]
            for release in sorted((run.run / "pulled").glob("*segmenter*"))[:1]
            if study
        ),
    ]


def summary(config: Config, seconds: float) -> str:
    """Say what was made, where it lies, and what to try next."""
    run = config.paths
    lines = (run.pretrain / "metrics.jsonl").read_text().splitlines()
    losses = [float(json.loads(line)["loss"]) for line in lines]
    panels = sorted((run.pretrain / "panels").glob("*.png"))
    table = list(csv.DictReader((run.report / "dice_by_subset.csv").open()))
    return "\n".join(
        [
            "",
            f"Done in {seconds:.0f} s. Everything lies under {run.run}/",
            f"  loss            {losses[0]:.3f} -> {losses[-1]:.3f}, {run.report / 'loss.png'}",
            f"  reconstruction  {panels[-1] if panels else 'none drawn'}",
            f"  Dice            {run.report / 'dice_by_subset.md'} ({len(table)} rows), pretrained",
            "                  beside from scratch, for every contrast subset",
            f"  releases        {run.release / 'encoder'}, {run.release / 'segmenter'}",
            f"  prediction      {run.report / 'prediction'}",
            "",
            "Try next:",
            f"  .venv/bin/tensorboard --logdir {run.run}",
            f"  .venv/bin/anycontrast verify {run.release / 'segmenter'}",
            f"  .venv/bin/anycontrast pretrain {CONFIG} name=mine pretrain.steps=500",
        ]
    )


def run_demo(overrides: list[str]) -> int:
    """Run every step; stop at the first that fails and return its exit code."""
    start_s = time.monotonic()
    config = load_config(CONFIG, overrides)
    done = 0
    while done < len(plan := steps(config, overrides)):
        words = plan[done]
        print(f"\n$ anycontrast {' '.join(words)}", flush=True)
        if code := main(words):
            return code
        done += 1
    print(summary(config, time.monotonic() - start_s))
    return 0


if __name__ == "__main__":
    sys.exit(run_demo(sys.argv[1:]))
