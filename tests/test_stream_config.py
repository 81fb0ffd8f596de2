"""What a stream may be asked for: refused values by name, and the round trip through OmegaConf."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from anycontrast_datasets.mixing import MixingConfig
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


def test_mixing_weights_come_from_yaml_and_overrides() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(StreamConfig),
        OmegaConf.create({"mixing": {"by_dataset": {"brats-2021": 2}}}),
        OmegaConf.from_dotlist(["mixing.by_contrast_set.T1w+FLAIR=0.5", "mixing.temperature=2"]),
    )
    mixing = MixingConfig(
        by_dataset={"brats-2021": 2.0}, by_contrast_set={"T1w+FLAIR": 0.5}, temperature=2.0
    )
    assert OmegaConf.to_object(merged) == StreamConfig(mixing=mixing)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pack_tokens": 0}, "pack_tokens must be >= 1, got 0; leave it out"),
        ({"pool_studies": 0}, "pool_studies must be >= 1"),
        ({"draws_per_study": 0}, "draws_per_study must be >= 1"),
        ({"on_corrupt": "ignore"}, "on_corrupt must be stop or skip, got 'ignore'"),
        ({"max_corrupt_fraction": 1.5}, "max_corrupt_fraction must be in 0 .. 1, got 1.5"),
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
