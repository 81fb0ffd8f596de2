"""Loading: exactly the checkpoint's encoder, strictly, and without a training stack."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import anycontrast
from anycontrast.models.amae import AMAE
from anycontrast.release.errors import ReleaseError, ReleaseNotFoundError
from anycontrast.release.files import MANIFEST, write_manifest
from anycontrast.release.load import load_pretrained, load_segmenter
from anycontrast.training.checkpoint import load_weights
from anycontrast.training.config import Config
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.store.reader import open_store


@pytest.fixture
def release(tiny_run: Config, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.paths.release / "encoder", tmp_path / "encoder"))


def _seal(folder: Path) -> Path:
    """Write the manifest anew: the release is whole again, whatever it says."""
    facts = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, {key: facts[key] for key in ("name", "kind", "license")})
    return folder


def _retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return _seal(folder)


def _reconfig(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return _seal(folder)


def test_features_equal_the_checkpoints_encoder_bit_for_bit(tiny_run: Config) -> None:
    pretrained = anycontrast.load_pretrained(tiny_run.paths.release / "encoder")
    model = AMAE(tiny_run.model)
    model.load_state_dict(load_weights(tiny_run.paths.pretrain / "checkpoints")[0])
    store = open_store(tiny_run.paths.shards)
    studies = [store.read(0), store.read(1)]
    batch = pack_studies(studies, tiny_run.model.patch_vox, epochs=[0, 0])
    with torch.no_grad():
        expected, _ = model.eval().encoder(batch)
    features, _ = pretrained.encode(studies)
    assert features.shape == (batch.num_tokens, 64)
    assert torch.equal(features, expected)
    assert not pretrained.encoder.training


def test_a_segmenter_release_gives_its_own_encoder(tiny_run: Config) -> None:
    pretrained = load_pretrained(tiny_run.paths.release / "segmenter")
    tensors, _ = load_weights(tiny_run.paths.finetune / "pretrained" / "checkpoints")
    for name, value in pretrained.encoder.state_dict().items():
        assert torch.equal(value, tensors[f"encoder.{name}"])
    before = load_pretrained(tiny_run.paths.release / "encoder").encoder.state_dict()
    assert any(
        not torch.equal(value, before[name])
        for name, value in pretrained.encoder.state_dict().items()
    )


def test_a_study_folder_is_read_as_it_was_for_training(tiny_run: Config) -> None:
    pretrained = load_pretrained(tiny_run.paths.release / "encoder")
    store = open_store(tiny_run.paths.shards)
    folder = next((tiny_run.paths.source / "sub-0001").iterdir())
    study = pretrained.read(folder)
    index = next(i for i, r in enumerate(store.records) if "0001" in r.study_id)
    stored = store.read(index)
    assert set(study.codes) == set(stored.codes)
    assert pretrained.prepare_config == tiny_run.prepare
    features, batch = pretrained.encode([study])
    assert len(features) == batch.num_tokens > 0


def test_it_loads_from_a_url(
    tiny_run: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANYCONTRAST_CACHE", str(tmp_path / "cache"))
    url = (tiny_run.paths.release / "encoder").resolve().as_uri()
    assert anycontrast.load_pretrained(url).path.parent == tmp_path / "cache"


def test_a_missing_tensor_is_refused(release: Path) -> None:
    _retensor(release, lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(ReleaseError, match=r"missing \['.+'\].*1, 0 and 0 in all"):
        load_pretrained(release)


def test_a_left_over_tensor_is_refused(release: Path) -> None:
    _retensor(release, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ReleaseError, match=r"unexpected \['extra'\]"):
        load_pretrained(release)


def test_a_tensor_of_another_shape_is_refused(release: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = next(n for n, value in sorted(tensors.items()) if value.ndim == 2)
        tensors[name] = tensors[name][:-1].contiguous()

    _retensor(release, cut)
    with pytest.raises(ReleaseError, match=r"other shape \['.+'\]"):
        load_pretrained(release)


def test_a_pickle_under_the_name_of_weights_is_refused(release: Path) -> None:
    (release / "model.safetensors").write_bytes(b"\x80\x04\x95not safetensors")
    with pytest.raises(ReleaseError, match="cannot read it"):
        load_pretrained(_seal(release))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "robot"},
        {"kind": ["encoder"]},
        {"model": {"from_the_future": 1}},
        {"model": None},
        {"model": {"preset": "tiny", "width": -4}},
    ],
)
def test_a_config_that_is_not_understood_is_refused(
    release: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(ReleaseError, match="upgrade anycontrast"):
        load_pretrained(_reconfig(release, **changes))


def test_a_config_that_is_no_object_is_refused(release: Path) -> None:
    (release / "config.json").write_text("[]")
    with pytest.raises(ReleaseError, match="cannot read it"):
        load_pretrained(_seal(release))


def test_a_preparation_that_is_not_understood_is_refused(release: Path) -> None:
    pretrained = load_pretrained(_reconfig(release, prepare={"spacing_mm": "wide"}))
    with pytest.raises(ReleaseError, match="cannot read it"):
        _ = pretrained.prepare_config


def test_an_encoder_has_no_head_and_says_what_to_do(release: Path) -> None:
    with pytest.raises(ReleaseError, match="encoder without a head: finetune it"):
        load_segmenter(release)


def test_a_region_cannot_name_a_path(tiny_run: Config, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run.paths.release / "segmenter", tmp_path / "segmenter"))
    segmenter = json.loads((folder / "config.json").read_text())["segmenter"]
    segmenter["regions"] = {"../../evil": [1], "x": [2]}
    with pytest.raises(ReleaseError, match=r"region is named '\.\./\.\./evil'"):
        load_segmenter(_reconfig(folder, segmenter=segmenter))


def test_a_stock_unetr_has_no_encoder_to_give(tiny_run: Config, tmp_path: Path) -> None:
    from anycontrast.models.segmenter import build_segmenter
    from anycontrast.training.config import load_config

    words = ["finetune.segmenter.head=unetr", "finetune.segmenter.contrasts=[DWI,ADC]"]
    yaml = tiny_run.paths.run.parent.parent / "tiny.yaml"
    config = load_config(yaml, words)
    model = build_segmenter(config.finetune.segmenter, config.model)
    folder = Path(shutil.copytree(tiny_run.paths.release / "segmenter", tmp_path / "segmenter"))
    save_file({n: v.clone() for n, v in model.state_dict().items()}, folder / "model.safetensors")
    from dataclasses import asdict

    _reconfig(folder, segmenter=asdict(config.finetune.segmenter))
    assert load_segmenter(folder)[1]["segmenter"]["head"] == "unetr"
    with pytest.raises(ReleaseError, match=r"stock UNETR.*load the encoder release"):
        load_pretrained(folder)


def test_nothing_there_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no release in"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ReleaseNotFoundError):
        load_pretrained(str(tmp_path))


def test_loading_needs_no_training_stack(tiny_run: Config) -> None:
    blocked = ("ray", "deepspeed", "webdataset", "tensorboard", "matplotlib", "nilearn", "triton")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import anycontrast
assert "torch" not in sys.modules
pretrained = anycontrast.load_pretrained({str(tiny_run.paths.release / "encoder")!r})
print(sum(p.numel() for p in pretrained.encoder.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
