"""Load a release: verified, strict, without pickle.

`load_pretrained(path)` gives the encoder and says how studies must be prepared for it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anycontrast.release.errors import ReleaseError
from anycontrast.release.files import verify_release
from anycontrast.release.hub import pull

if TYPE_CHECKING:
    from torch import Tensor, nn

    from anycontrast.models.amae import AMAEConfig
    from anycontrast.models.encoder import Encoder
    from anycontrast_datasets.batch import PackedBatch
    from anycontrast_datasets.prepare import PrepareConfig
    from anycontrast_datasets.study import StudyArrays


@dataclass(frozen=True)
class Pretrained:
    """A loaded encoder with what its release says of it."""

    encoder: "Encoder"
    """In eval mode, on the CPU, float32."""
    config: dict[str, Any]
    """The release's `config.json`."""
    path: Path

    @property
    def model_config(self) -> "AMAEConfig":
        """The architecture, all values filled in."""
        return _amae_config(self.config["model"])

    @property
    def prepare_config(self) -> "PrepareConfig":
        """How studies must be prepared: spacing, reference contrasts, box."""
        return prepare_config_of(self.config)

    def encode(self, studies: "list[StudyArrays]") -> "tuple[Tensor, PackedBatch]":
        """Encode whole studies, nothing hidden.

        Args:
            studies: prepared studies with any contrasts.

        Returns:
            Features [T, D] float32, one row per non-empty patch, and the batch that says which
            study, contrast and position (mm) each row is.
        """
        import torch

        from anycontrast_datasets.pack import pack_studies

        device = next(self.encoder.parameters()).device
        batch = pack_studies(studies, self.model_config.patch_vox, epochs=[0] * len(studies))
        with torch.no_grad():
            features_TD, _ = self.encoder(batch.to(device))
        return features_TD, batch


def load_pretrained(path: str | Path) -> Pretrained:
    """Load the encoder of a release.

    Args:
        path: a release folder, or the URL of one (pulled into the cache first). A segmenter
            release gives its encoder.

    Raises:
        ReleaseNotFoundError: nothing there.
        ReleaseError: damaged, or its tensors do not fit its config.
    """
    folder = pull(str(path)) if "://" in str(path) else Path(path)
    config, tensors = read_release(folder)
    from anycontrast.models.amae import AMAE

    if config["kind"] == "segmenter":
        tensors = {
            name.removeprefix("encoder."): value
            for name, value in tensors.items()
            if name.startswith("encoder.")
        }
    encoder = AMAE(_amae_config(config["model"])).encoder
    load_strictly(encoder, tensors, str(folder))
    return Pretrained(encoder.eval(), config, folder)


def load_segmenter(path: Path) -> "tuple[nn.Module, dict[str, Any]]":
    """Load the segmenter of a release, in eval mode on the CPU, with its config.

    Raises:
        ReleaseError: the release holds no segmentation head.
    """
    config, tensors = read_release(path)
    if config["kind"] != "segmenter":
        raise ReleaseError(
            f"release {path} holds an encoder without a head: finetune it "
            "(`anycontrast finetune`), export, and predict with that release"
        )
    from anycontrast.models.segmenter import segmenter_from_model_config

    model = segmenter_from_model_config({"segmenter": config["segmenter"], "amae": config["model"]})
    load_strictly(model, tensors, str(path))
    return model.eval(), config


def read_release(folder: Path) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """Verify a release and read its config and tensors.

    Raises:
        ReleaseNotFoundError: no release there.
        ReleaseError: any byte differs, or a file is not what its name says.
    """
    verify_release(folder)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text())
        if config["kind"] not in ("encoder", "segmenter"):
            raise ReleaseError(f"release {folder}: unknown kind {config['kind']!r} in config.json")
        return config, load_file(folder / "model.safetensors")
    except (ValueError, KeyError, SafetensorError) as error:
        raise ReleaseError(f"release {folder}: cannot read it: {error}") from error


def load_strictly(model: "nn.Module", tensors: "Mapping[str, Tensor]", where: str) -> None:
    """Load every tensor into its place; nothing may be missing, left over or of another shape.

    Raises:
        ReleaseError: naming the first offending keys.
    """
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    reshaped = [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if missing or extra or reshaped:
        raise ReleaseError(
            f"release {where}: its tensors do not fit its config: missing {missing[:3]}, "
            f"unexpected {extra[:3]}, other shape {reshaped[:3]} "
            f"({len(missing)}, {len(extra)} and {len(reshaped)} in all)"
        )
    model.load_state_dict(dict(tensors))


def prepare_config_of(config: Mapping[str, Any]) -> "PrepareConfig":
    """Read the preparation back from a release's config."""
    from anycontrast_datasets.prepare import PrepareConfig

    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config["prepare"].items()}
    if "reference" in values:
        values["reference"] = list(values["reference"])
    return PrepareConfig(**values)


def _amae_config(values: Mapping[str, Any]) -> "AMAEConfig":
    from anycontrast.models.amae import AMAEConfig

    return AMAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
