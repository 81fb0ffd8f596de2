"""The metadata of the Zarr store: what zarr-python would write, and OME-NGFF 0.5 by its rules."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.store.zarr_metadata import (
    FILL_CODE,
    ArrayLayout,
    array_layouts,
    chunk_shape,
    image_path,
    label_fill,
    level_shape,
    study_metadata,
)
from anycontrast_datasets.study import StudyArrays, StudyRecord

SHAPE = (24, 33, 17)


@pytest.fixture
def record(study_of: Callable[..., StudyArrays]) -> StudyRecord:
    codes = {name: np.ones(SHAPE, dtype=np.int16) for name in ("T1w", "FLAIR")}
    made = study_of(
        codes,
        "case-1",
        spacing_mm=(1.0, 2.0, 3.0),
        step_mm=(1.0, 2.0, 3.0),
        label=np.zeros(SHAPE, dtype=np.uint8),
    ).record
    affine = ((1.0, 0, 0, -10.0), (0, 2.0, 0, 5.0), (0, 0, 3.0, 7.0), (0, 0, 0, 1.0))
    return replace(made, affine=affine, reference="FLAIR", label_values=(1, 255))


@pytest.fixture
def nodes(record: StudyRecord) -> dict[str, dict[str, Any]]:
    layouts = array_layouts(record, chunk_vox=16, num_levels=3, codec="zstd", level=5)
    return {path: json.loads(text) for path, text in study_metadata(record, layouts).items()}


@pytest.mark.parametrize(
    ("shape", "longest", "chunk"),
    [
        ((160, 192, 160), 64, (54, 64, 54)),
        ((160, 192, 160), 96, (80, 96, 80)),
        ((160, 192, 160), 0, (160, 192, 160)),
        ((8, 100, 65), 64, (8, 50, 33)),
    ],
)
def test_chunks_divide_the_volume(
    shape: tuple[int, int, int], longest: int, chunk: tuple[int, int, int]
) -> None:
    assert chunk_shape(shape, longest) == chunk
    wasted = [-n % c for n, c in zip(shape, chunk, strict=True)]
    assert all(w < n // c + 1 for w, n, c in zip(wasted, shape, chunk, strict=True))


def test_array_metadata_is_what_zarr_python_writes(nodes: dict[str, dict[str, Any]]) -> None:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    for path, dtype, fill in (
        ("case-1/T1w/0", "int16", FILL_CODE),
        ("case-1/FLAIR/labels/label/0", "uint8", 254),
    ):
        ours = nodes[f"{path}/zarr.json"]
        sharding = ours["codecs"][0]["configuration"]
        memory: dict[str, Any] = {}
        array = zarr.create_array(
            zarr.storage.MemoryStore(memory),
            shape=SHAPE,
            shards=tuple(ours["chunk_grid"]["configuration"]["chunk_shape"]),
            chunks=tuple(sharding["chunk_shape"]),
            dtype=dtype,
            fill_value=fill,
            compressors=[
                BloscCodec(
                    cname="zstd",
                    clevel=5,
                    shuffle="shuffle",
                    typesize=np.dtype(dtype).itemsize,
                    blocksize=2**20,
                ),
                Crc32cCodec(),
            ],
            dimension_names=["x", "y", "z"],
        )
        assert array.metadata.to_dict()["codecs"]
        assert ours == json.loads(memory["zarr.json"].to_bytes())


def check_multiscales(nodes: dict[str, dict[str, Any]], path: str) -> dict[str, Any]:
    """Hold an image group against the rules of OME-NGFF 0.5; return its one multiscale."""
    ome = nodes[f"{path}/zarr.json"]["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (scales,) = ome["multiscales"]
    names = [axis["name"] for axis in scales["axes"]]
    assert 2 <= len(names) <= 5 and len(set(names)) == len(names)
    assert [axis["type"] for axis in scales["axes"]].count("space") in (2, 3)
    assert {axis["unit"] for axis in scales["axes"]} == {"millimeter"}
    sizes = []
    for dataset in scales["datasets"]:
        array = nodes[f"{path}/{dataset['path']}/zarr.json"]
        assert array["node_type"] == "array" and array["dimension_names"] == names
        assert len(array["shape"]) == len(names)
        sizes.append(np.prod(array["shape"]))
        scale, translation = dataset["coordinateTransformations"]
        assert (scale["type"], translation["type"]) == ("scale", "translation")
        assert len(scale["scale"]) == len(translation["translation"]) == len(names)
        assert all(value > 0 for value in scale["scale"])
    assert sizes == sorted(sizes, reverse=True), "resolutions go from fine to coarse"
    return dict(scales)


def test_images_follow_the_ome_rules(nodes: dict[str, dict[str, Any]], record: StudyRecord) -> None:
    for name in ("T1w", "FLAIR"):
        scales = check_multiscales(nodes, f"case-1/{name}")
        assert scales["name"] == name and len(scales["datasets"]) == 3
        (channel,) = nodes[f"case-1/{name}/zarr.json"]["attributes"]["ome"]["omero"]["channels"]
        window = channel["window"]
        assert channel["label"] == name and len(channel["color"]) == 6
        assert window["min"] <= window["start"] < window["end"] <= window["max"]
        ours = nodes[f"case-1/{name}/zarr.json"]["attributes"]["anycontrast"]
        assert ours["affine_ras_mm"] == [list(row) for row in record.affine]


def test_label_follows_the_ome_rules(nodes: dict[str, dict[str, Any]]) -> None:
    labels = nodes["case-1/FLAIR/labels/zarr.json"]["attributes"]["ome"]
    assert labels == {"version": "0.5", "labels": ["label"]}
    check_multiscales(nodes, "case-1/FLAIR/labels/label")
    found = nodes["case-1/FLAIR/labels/label/zarr.json"]["attributes"]["ome"]["image-label"]
    assert found["source"] == {"image": "../../"}
    assert [color["label-value"] for color in found["colors"]] == [1, 255]
    assert all(len(color["rgba"]) == 4 for color in found["colors"])


def test_transformations_agree_with_the_affine(
    nodes: dict[str, dict[str, Any]], record: StudyRecord
) -> None:
    affine = np.array(record.affine)
    for path, centre in (("case-1/T1w", 0.5), ("case-1/FLAIR/labels/label", 0.0)):
        (scales,) = nodes[f"{path}/zarr.json"]["attributes"]["ome"]["multiscales"]
        for resolution, dataset in enumerate(scales["datasets"]):
            scale, translation = (
                np.array(t[t["type"]]) for t in dataset["coordinateTransformations"]
            )
            for voxel in ((0, 0, 0), (2, 1, 3)):
                # Where that voxel of the coarse array lies in voxels of the full one.
                factor = 2**resolution
                full = np.array(voxel) * factor + centre * (factor - 1)
                expected = (affine @ [*full, 1])[:3]
                np.testing.assert_allclose(np.array(voxel) * scale + translation, expected)


def test_consolidated_metadata_holds_every_node(nodes: dict[str, dict[str, Any]]) -> None:
    inline = nodes["case-1/zarr.json"]["consolidated_metadata"]
    assert inline["kind"] == "inline" and inline["must_understand"] is False
    expected = {
        path.removeprefix("case-1/").removesuffix("/zarr.json"): node
        for path, node in nodes.items()
        if path != "case-1/zarr.json"
    }
    assert inline["metadata"] == expected and "FLAIR/labels/label/2" in expected


def test_fill_values_are_reserved(record: StudyRecord) -> None:
    assert FILL_CODE < 0
    assert label_fill(record) == 254, "255 is in the label"
    assert label_fill(replace(record, label_values=())) == 255
    layouts = array_layouts(record, chunk_vox=16, num_levels=2, codec="zstd", level=5)
    assert layouts["label", 0].fill == 254 and layouts["T1w", 1].fill == FILL_CODE
    assert layouts["T1w", 1].shape == level_shape(SHAPE, 1) == (12, 17, 9)


def test_label_lies_under_the_reference_or_the_first_contrast(record: StudyRecord) -> None:
    assert image_path(record, "label") == "case-1/FLAIR/labels/label"
    without = replace(record, reference="")
    assert image_path(without, "label") == "case-1/T1w/labels/label"


def test_shard_covers_the_array_with_whole_chunks() -> None:
    layout = ArrayLayout(
        shape=(10, 7, 5), dtype="int16", chunk=(4, 7, 2), fill=-1, codec="zstd", level=5
    )
    assert layout.grid == (3, 1, 3) and layout.num_chunks == 9 and layout.shard == (12, 7, 6)
