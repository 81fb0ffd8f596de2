"""The step benchmark: operations as counted, bars as stated, and nothing needed but torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anycontrast.bench import step, step_case
from anycontrast.bench.step import MODELS, REFERENCE, StepBenchConfig
from anycontrast.bench.step_case import noise_pack, step_flops
from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.masking import MaskingConfig, mask_batch
from anycontrast_kernels.linear import is_onednn_chosen

ALONE = """
import sys
sys.modules.update(dict.fromkeys({names}))
from anycontrast.bench import step_case, step
from anycontrast.models.masking import MaskingConfig, mask_batch
pack = mask_batch(step_case.noise_pack(1, 2, 8, (4, 4, 4)), MaskingConfig(), 0)
model = step_case.AMAE(step_case.AMAEConfig(preset="tiny", patch_vox=(4, 4, 4)))
step_case._step(model, pack, "fp32")
sys.stdout.write(str(sum(p.grad is not None for p in model.parameters())))
"""
"""Runs as on an image that has torch, triton and numpy only."""
OTHERS = [
    "blosc",
    "deepspeed",
    "huggingface_hub",
    "matplotlib",
    "monai",
    "nibabel",
    "nilearn",
    "numcodecs",
    "omegaconf",
    "pandas",
    "prometheus_client",
    "pyarrow",
    "pydicom",
    "pydantic",
    "ray",
    "requests",
    "safetensors",
    "scipy",
    "skimage",
    "tensorboard",
    "torchvision",
    "tqdm",
    "webdataset",
    "xxhash",
    "zarr",
]


def test_it_runs_where_there_is_only_torch_triton_and_numpy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(names=OTHERS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 40


@pytest.mark.parametrize("decoder", ["joint", "cross"])
def test_operations_are_those_that_torch_counts(decoder: Literal["joint", "cross"]) -> None:
    is_onednn_chosen()  # its probe would be counted
    config = AMAEConfig(preset="tiny", patch_vox=(8, 8, 8), decoder=decoder)
    fraction = 1.0 if decoder == "joint" else 0.25
    masking = MaskingConfig(hidden_fraction=0.75, target_fraction=fraction)
    pack = mask_batch(noise_pack(2, 3, 32, (8, 8, 8)), masking, 0)
    visible, targets, tokens = 48, 144 if decoder == "joint" else 36, 192
    assert (pack.visible_lengths, pack.target_lengths) == ((visible,) * 2, (targets,) * 2)
    pairs = tokens * tokens if decoder == "joint" else targets * visible
    attention = 3 * 2 * (2 * 4 * 128 * visible**2 + 4 * 64 * pairs)
    with FlopCounterMode(display=False) as counter:
        step_case._step(AMAE(config), pack, "fp32")
    counted = counter.get_total_flops() + attention
    # The tokenizer's rows per volume are left out of the formula.
    assert step_flops(config, pack) == pytest.approx(counted, rel=5e-3)


def test_the_reference_has_the_size_of_bm_mae() -> None:
    config = AMAEConfig(**MODELS[REFERENCE])
    with torch.device("meta"):
        count = sum(p.numel() for p in AMAE(config).parameters())
    assert count == pytest.approx(76.5e6, rel=0.001)
    encoder, decoder = config.encoder_config(), config.decoder_config()
    assert (encoder.width, encoder.depth, encoder.width * encoder.mlp_ratio) == (768, 12, 1536)
    assert (decoder.width, decoder.depth, config.patch_vox) == (384, 3, (16, 16, 16))


def test_a_run_saves_its_table_and_holds_the_reference_against_the_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_case, "PRODUCT_SIDE", {"cpu": 64})
    monkeypatch.setattr(step, "_in_new_process", _in_process)
    monkeypatch.setitem(MODELS, REFERENCE, {"preset": "tiny"})
    config = StepBenchConfig(
        preset=f"{REFERENCE}, tiny", device="cpu", side_vox=32, rounds=1, threads=1,
        folder=str(tmp_path),
    )  # fmt: skip
    found = json.loads(json.dumps(step.run(config)))
    assert [(case["preset"], case["decoder"]) for case in found["cases"]] == [
        (name, decoder) for name in (REFERENCE, "tiny") for decoder in ("joint", "cross")
    ]
    assert set(found["bars"]) == {
        "joint_cpu_s", "joint_peak_gb", "joint_over_products", "cross_cpu_s",
    }  # fmt: skip
    assert found["cpu_s"] == found["cases"][0]["cpu_s"] > 0
    assert 0.05 < found["peak_gb"] < 64
    assert json.loads((tmp_path / "step.json").read_text())["cases"] == found["cases"]
    assert (tmp_path / "step.md").read_text().count("\n| tiny |") == 2
    picture = ElementTree.fromstring((tmp_path / "step.svg").read_text())
    assert {"joint", "cross", "tiny"} <= set(picture.itertext())


def _in_process(case: step_case.StepCase) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return {**vars(case), **step_case.measure(case)}
    finally:
        torch.set_num_threads(threads)


def test_a_process_that_fails_is_named_with_its_last_line() -> None:
    case = step._case(StepBenchConfig(), "tiny", "joint", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="preset must be one of"):
        step._in_new_process(replace(case, model={"preset": "none", "patch_vox": (16, 16, 16)}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "gigantic"}, "preset must be of"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"contrasts": 9}, "contrasts must be <= 7"),
        ({"side_vox": 100}, "whole patches"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepBenchConfig(**values)
