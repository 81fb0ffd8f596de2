"""The card of a release: a README that a person reads and a hub indexes."""

from pathlib import Path
from typing import Any

from anycontrast.release.files import write_synced

_USE = {
    "encoder": """\
```python
import anycontrast

pretrained = anycontrast.load_pretrained("PATH_OR_URL")
study = pretrained.read("STUDY_DIR")  # a folder of NIfTI files, named by contrast
features, batch = pretrained.encode([study])  # one row per non-empty patch of every contrast
```""",
    "segmenter": """\
```bash
anycontrast predict PATH_OR_URL STUDY_DIR OUT
```

`anycontrast.load_pretrained("PATH_OR_URL")` gives the encoder of a segmenter with an adaptive
head.""",
}
_TASK = {"encoder": "image-feature-extraction", "segmenter": "image-segmentation"}


def write_card(path: Path, facts: dict[str, Any], score: Any, description: str) -> None:
    """Write `README.md` with the metadata block that model hubs read.

    Args:
        path: the file to write.
        facts: the release's `config.json`.
        score: rows of Dice per contrast subset, or None when nothing was evaluated.
        description: one paragraph of the author's, may be empty.
    """
    seen = "\n".join(f"| {name} | {count} |" for name, count in facts["contrasts_seen"].items())
    model, training = facts["model"], facts["training"]
    text = f"""\
---
{_license_metadata(facts["license"])}
library_name: anycontrast
pipeline_tag: {_TASK[facts["kind"]]}
tags: [mri, brain, masked-autoencoder, missing-contrasts]
---

# {facts["name"]}

{description or "A 3D MRI transformer pretrained on studies with any subset of contrasts."}

## Use

{_USE[facts["kind"]]}

Research use only; not a medical device, not for diagnosis.

## What it expects

- orientation and grid: {facts["orientation"]}
- spacing (mm): {facts["prepare"].get("spacing_mm")}
- intensity: {facts["intensity"]}
- patch (voxels): {tuple(model["patch_vox"])}, width {model["width"]}, depth {model["depth"]}

## Contrasts seen in pretraining

| contrast | volumes |
|---|--:|
{seen}

## Training

Step {training["step"]}, seed {training["seed"]}, data `{training["dataset"]}` (fingerprint
`{training["dataset_fingerprint"][:16]}`), anycontrast {facts["anycontrast_version"]}.

## Evaluation

{_score_text(score)}

The decoder is not part of this release: it is built to fill in images and can recall training data.
"""
    write_synced(path, text.encode())


# Identifiers that hubs know in this spelling; any other licence is `other` with a name.
_CREATIVE_COMMONS = {f"cc-{kind}-4.0" for kind in ("by", "by-sa", "by-nc", "by-nc-sa", "by-nc-nd")}
_HUB_LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0"} | _CREATIVE_COMMONS


def _license_metadata(spdx: str) -> str:
    if spdx.lower() in _HUB_LICENSES:
        return f"license: {spdx.lower()}"
    return f"license: other\nlicense_name: {spdx}\nlicense_link: LICENSE"


def _score_text(score: Any) -> str:
    """A table of the report's rows, or that there is none."""
    if not score:
        return "Not evaluated on a downstream task by this release."
    lines = [
        f"Dice, split {score['protocol']['split']}, {score['num_studies']} studies; mean and 95 % "
        "interval over studies. Every number is in `eval.json`.",
        "",
        "| contrasts | region | model | Dice |",
        "|---|---|---|--:|",
    ]
    for row in score["rows"]:
        lines.append(f"| {row['subset']} | {row['region']} | {row['variant']} | {_interval(row)} |")
    return "\n".join(lines)


def _interval(row: dict[str, Any]) -> str:
    mean, low, high = (row.get(f"dice_{part}") for part in ("mean", "low", "high"))
    if mean is None:
        return "none"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f}-{high:.3f})"
