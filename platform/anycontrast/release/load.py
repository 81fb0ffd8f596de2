"""Load a release: verified, strict, without pickle.

`load_pretrained(path)` gives the encoder and says how studies must be prepared for it.
"""

import json
import re
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
    from anycontrast.models.segmenter import Segmenter
    from anycontrast_datasets.batch import PackedBatch
    from anycontrast_datasets.ledger import Refusal
    from anycontrast_datasets.prepare import PrepareConfig
    from anycontrast_datasets.study import StudyArrays
    from anycontrast_datasets.volume import LoadedVolume


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

    def read(self, study_dir: str | Path, *, table: str | Path | None = None) -> "StudyArrays":
        """Read one study from a folder of NIfTI files, prepared as this encoder expects.

        Args:
            study_dir: the folder; contrasts are read from file names.
            table: CSV or TSV (file, subject, session, contrast, label) that names them instead.

        Raises:
            StudyError: no usable volume.
        """
        return read_study_dir(Path(study_dir), table, self.prepare_config)[0]

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
    folder = release_folder(path)
    config, tensors = read_release(folder)
    from anycontrast.models.amae import AMAE

    if config["kind"] == "segmenter":
        tensors = _encoder_of_segmenter(tensors, folder)
    try:
        encoder = AMAE(_amae_config(config["model"])).encoder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_config(folder, error) from error
    load_strictly(encoder, tensors, str(folder))
    return Pretrained(encoder.eval(), config, folder)


def release_folder(source: str | Path) -> Path:
    """Return a release's folder; a URL is pulled into the cache first.

    Raises:
        ReleaseNotFoundError: nothing there.
        ReleaseError: what was pulled is damaged.
    """
    return pull(str(source)) if "://" in str(source) else Path(source).expanduser()


def read_study_dir(
    study_dir: Path, table: str | Path | None, prepare: "PrepareConfig"
) -> "tuple[StudyArrays, dict[str, LoadedVolume], tuple[Refusal, ...]]":
    """Read one study from a folder and prepare it.

    Args:
        study_dir: folder of NIfTI files.
        table: names the contrasts; None reads file names.
        prepare: as the release says.

    Returns:
        The prepared study, its volumes as loaded, by contrast, and the files not used.

    Raises:
        StudyError: no usable volume.
    """
    from anycontrast_datasets.prepare import prepare_volumes
    from anycontrast_datasets.sources.study_dir import scan_study_dir
    from anycontrast_datasets.volume import read_volume

    found = scan_study_dir(study_dir, Path(table) if table is not None else None)
    volumes = {contrast: read_volume(path) for contrast, path in found.paths.items()}
    return prepare_volumes(found.study, volumes, None, prepare), volumes, found.refused


def load_segmenter(path: Path) -> "tuple[Segmenter, dict[str, Any]]":
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

    try:
        model = segmenter_from_model_config(
            {"segmenter": config["segmenter"], "amae": config["model"]}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_config(path, error) from error
    _check_region_names(list(model.regions), path)
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
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["kind"] not in ("encoder", "segmenter"):
            raise ReleaseError(
                f"release {folder}: kind must be encoder or segmenter, config.json says "
                f"{config['kind']!r}; upgrade anycontrast, or ask who published it"
            )
        return config, load_file(folder / "model.safetensors")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _bad_config(folder, error) from error


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
            f"({len(missing)}, {len(extra)} and {len(reshaped)} in all); export it again"
        )
    model.load_state_dict(dict(tensors))


def prepare_config_of(config: Mapping[str, Any]) -> "PrepareConfig":
    """Read the preparation back from a release's config.

    Raises:
        ReleaseError: it holds something else.
    """
    from anycontrast_datasets.prepare import PrepareConfig

    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) and name != "reference" else value
            for name, value in config["prepare"].items()
        }
        return PrepareConfig(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_config(config.get("name", ""), error) from error


def _encoder_of_segmenter(tensors: "Mapping[str, Tensor]", folder: Path) -> "dict[str, Tensor]":
    found = {
        name.removeprefix("encoder."): value
        for name, value in tensors.items()
        if name.startswith("encoder.")
    }
    if not found:
        raise ReleaseError(
            f"release {folder} is a stock UNETR, whose encoder has its contrasts mixed into fixed "
            "channels and is not AMAE's any more; load the encoder release of that run, or predict "
            "with this one"
        )
    return found


def _check_region_names(regions: list[str], folder: Path) -> None:
    """Files are named after regions: no name may lead elsewhere."""
    for name in regions:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            raise ReleaseError(
                f"release {folder}: a region is named {name!r}; names are letters, digits, '_', "
                "'-' and '.'; rename the region, finetune and export again"
            )


def _bad_config(where: object, error: Exception) -> ReleaseError:
    return ReleaseError(
        f"release {where}: cannot read it ({type(error).__name__}: {error}); upgrade "
        "anycontrast if a newer one wrote it, else export it again"
    )


def _amae_config(values: Mapping[str, Any]) -> "AMAEConfig":
    from anycontrast.models.amae import AMAEConfig

    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return AMAEConfig(**plain)
