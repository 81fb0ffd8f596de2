"""What a stream may be asked for: refused values by name, and the round trip through OmegaConf."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from anycontrast_datasets.stream import StreamConfig


def test_config_comes_back_from_yaml_and_overrides_with_its_types() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(StreamConfig),
        OmegaConf.create({"crop_vox": [96, 96, 64], "flip_axes": [], "contrasts": ["T1w"]}),
        OmegaConf.from_dotlist(["studies_per_step=8"]),
    )
    expected = StreamConfig(
        studies_per_step=8, crop_vox=(96, 96, 64), flip_axes=[], contrasts=["T1w"]
    )
    assert OmegaConf.to_object(merged) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"studies_per_step": 0}, "studies_per_step must be >= 1, got 0"),
        ({"packs_per_step": 0}, "packs_per_step must be >= 1"),
        ({"packs_per_step": 5}, r"packs_per_step must be <= studies_per_step \(4\), got 5"),
        ({"num_threads": 0}, "num_threads must be >= 1"),
        ({"prefetch_steps": -1}, "prefetch_steps must be >= 0"),
        ({"split": "training"}, "split must be one of .* got 'training'"),
        ({"contrasts": ["T1x"]}, "T1x"),
        ({"crop_vox": (8, 0, 8)}, "crop_vox must be positive"),
        ({"flip_axes": [3]}, r"flip_axes must be .* got \[3\]"),
        ({"flip_axes": [0, 0]}, "flip_axes"),
        ({"foreground_crop_fraction": 1.5}, "foreground_crop_fraction must be in 0 .. 1"),
        ({"foreground_crop_fraction": 0.5}, "needs crop_vox and labels=true"),
    ],
)
def test_bad_config_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**values)
