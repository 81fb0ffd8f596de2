"""The pictures of a report: middle slices of a few stored studies per contrast, as PNG.

Only volumes without a face are shown (skull-stripped, defaced, refaced), or any volume of synthetic
data; never a contrast that fewer subjects have than a cell must. PNG is written here, 8 bit grey,
so that the same voxels give the same bytes and no drawing library is loaded.
"""

import logging
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.study import ShardError, VolumeRecord

logger = logging.getLogger(__name__)

FACELESS = frozenset({"stripped", "defaced", "refaced"})
MAX_STUDIES = 5
"""Studies shown per contrast."""
MAX_LOOKED_AT = 4096
"""Studies that those shown are chosen among, spread over the store."""
MAX_SIDE_VOX = 256
"""Of a picture; larger planes are thinned out."""

Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One slice."""

    contrast: str
    dataset: str
    png: bytes
    size_mm: tuple[float, float]
    """Width and height."""
    plane_mm: float
    """Distance of the plane from the centre of the box, feet to head."""


def montage(
    store: StudyStore,
    contrasts: Sequence[str],
    faces: Mapping[tuple[str, str], str],
    *,
    any_face: bool,
) -> dict[str, list[Picture]]:
    """Take the axial plane with most foreground of a few studies of every contrast.

    Args:
        store: Prepared studies.
        contrasts: Which, in this order.
        faces: `(study id, contrast)` -> face state, of the volumes of the manifest.
        any_face: Show volumes whatever is known of a face: the data are synthetic.

    Returns:
        Pictures per contrast; contrasts without a volume that may be shown are left out.
    """
    records = store.records
    looked_at = range(0, len(records), -(-len(records) // MAX_LOOKED_AT))
    fitting: dict[str, dict[str, list[int]]] = {name: {} for name in contrasts}
    for index in looked_at:
        record = records[index]
        for contrast in set(record.contrasts) & set(contrasts):
            state = faces.get((record.study_id, contrast))
            if state is not None and (any_face or state in FACELESS):
                fitting[contrast].setdefault(record.dataset, []).append(index)
    found = {name: _pictures(store, _spread(fitting[name]), name) for name in contrasts}
    return {name: pictures for name, pictures in found.items() if pictures}


def _pictures(store: StudyStore, indices: Sequence[int], contrast: str) -> list[Picture]:
    pictures = []
    for index in indices:
        try:
            pictures.append(_picture(store, index, contrast))
        except ShardError as error:
            logger.warning("a picture is left out of the report: %s", error)
    return pictures


def _spread(by_dataset: Mapping[str, Sequence[int]]) -> list[int]:
    """Choose a few studies, of as many datasets as possible, evenly over each."""
    chosen: list[int] = []
    for turn in range(MAX_STUDIES):
        for name in sorted(by_dataset):
            own = by_dataset[name]
            place = own[turn * len(own) // MAX_STUDIES]
            if place not in chosen and len(chosen) < MAX_STUDIES:
                chosen.append(place)
    return sorted(chosen)


def _picture(store: StudyStore, index: int, contrast: str) -> Picture:
    arrays = store.read(index, contrasts=[contrast])
    record = arrays.record
    codes = arrays.codes[contrast]
    plane = int(np.argmax(np.count_nonzero(codes, axis=(0, 1))))
    image = _grey(codes[:, :, plane], record.volumes[0])
    spacing = record.spacing_mm
    size_mm = (codes.shape[0] * spacing[0], codes.shape[1] * spacing[1])
    step = -(-max(image.shape) // MAX_SIDE_VOX)
    png = encode_png(_oriented(image)[::step, ::step])
    offset_mm = (plane + 0.5 - codes.shape[2] / 2) * spacing[2]
    return Picture(contrast, record.dataset, png, size_mm, offset_mm)


def _oriented(image: Grey) -> Grey:
    """Turn [X, Y] of R+, A+ axes into rows from front to back, the subject's right on the left."""
    return np.ascontiguousarray(image[::-1, ::-1].T)


def _grey(codes: npt.NDArray[np.int16], volume: VolumeRecord) -> Grey:
    """Map codes to grey from the 0.5th to the 99.5th percentile; background is black."""
    span = max(volume.p99_5 - volume.p0_5, 1e-12)
    values = codes * volume.scale + volume.offset
    grey = np.clip((values - volume.p0_5) / span, 0, 1) * 255
    return np.where(codes == 0, 0, np.rint(grey)).astype(np.uint8)


def encode_png(image: Grey) -> bytes:
    """Return an 8-bit grey image [rows, columns] as PNG.

    Source: PNG specification, third edition, sections 5, 9 and 11.
    """
    height, width = image.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)  # filter type 0 before each row
    rows[:, 1:] = image
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
