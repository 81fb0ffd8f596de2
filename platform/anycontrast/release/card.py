"""The card of a release: a README that a person reads and a hub indexes."""

from pathlib import Path
from typing import Any

from anycontrast.release.files import write_synced

_USE = {
    "encoder": """\
```python
import anycontrast

pretrained = anycontrast.load_pretrained("PATH_OR_URL")
features, batch = pretrained.encode([study])  # one row per non-empty patch of every contrast
```""",
    "segmenter": """\
```bash
anycontrast predict PATH STUDY_DIR OUT
```""",
}


def write_card(path: Path, facts: dict[str, Any], score: Any, description: str) -> None:
    """Write `README.md` with the metadata block that model hubs read.

    Args:
        path: the file to write.
        facts: the release's `config.json`.
        score: rows of Dice per contrast subset, or None when nothing was evaluated.
        description: one paragraph of the author's, may be empty.
    """
    seen = "\n".join(f"| {name} | {count} |" for name, count in facts["contrasts_seen"].items())
    model = facts["model"]
    text = f"""\
---
license: {facts["license"].lower()}
library_name: anycontrast
pipeline_tag: image-feature-extraction
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

Step {facts["training"]["step"]}, seed {facts["training"]["seed"]}, data
`{facts["training"]["dataset"]}` (fingerprint `{facts["training"]["dataset_fingerprint"][:16]}`),
anycontrast {facts["anycontrast_version"]}.

## Evaluation

{_score_text(score)}

The decoder is not part of this release: it is built to fill in images and can recall training data.
"""
    write_synced(path, text.encode())


def _score_text(score: Any) -> str:
    if not score:
        return "Not evaluated on a downstream task by this release."
    return "Expected score, Dice per contrast subset: see `eval.json`."
