"""BIDS, leniently: subject, session and contrast from entities in the file name, wherever it lies.

In: a folder with names like `sub-01_ses-1_ce-gd_T1w.nii.gz`. The suffix may have any case and any
synonym of the vocabulary (`_t1ce`). JSON sidecars give the physics. Masks (`_mask`, `_dseg`,
`_msk`, ...) are labels, also under `derivatives/`; other images there are refused, because they
repeat the raw ones.

Source: BIDS specification 1.10, entities and suffixes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.sources.claims import (
    ContrastReading,
    FileClaim,
    SourceOptions,
    read_name,
    read_stated,
)
from anycontrast_datasets.sources.grouping import build_studies
from anycontrast_datasets.sources.listing import list_images, refuse_format, stem
from anycontrast_datasets.study import Study

_LABEL_SUFFIXES = ("mask", "msk", "dseg", "seg", "roi", "lesion")


@dataclass(frozen=True)
class BidsName:
    """A BIDS file name in parts."""

    entities: dict[str, str]
    suffix: str
    """Lower case; empty when the name ends with an entity."""


def scan(root: Path, options: SourceOptions) -> Iterator[Study | Refusal]:
    """Yield the studies of a BIDS folder and a refusal for every other image in it.

    Raises:
        ManifestError: the folder is missing or cannot be listed.
    """
    claims = [claim_file(location) for location in list_images(root)]
    yield from build_studies(root, claims, options)


def parse_name(location: str) -> BidsName:
    """Return the entities and the suffix of a file name."""
    entities: dict[str, str] = {}
    suffix = ""
    for part in stem(location).split("_"):
        key, dash, value = part.partition("-")
        if dash:
            entities[key.lower()] = value
        else:
            suffix = part.lower()
    return BidsName(entities, suffix)


def claim_file(location: str) -> FileClaim | Refusal:
    """Return what the name of one image says, or why it cannot be placed."""
    if refusal := refuse_format(location):
        return refusal
    name = parse_name(location)
    subject, session = name.entities.get("sub", ""), name.entities.get("ses", "")
    if not subject:
        return refuse(location, "no_subject", "the file name has no sub- entity")
    if name.suffix in _LABEL_SUFFIXES:
        if _is_brain_mask(name):
            return refuse(location, "brain_mask", "a mask of the brain, not of a finding")
        return FileClaim(location=location, subject=subject, session=session, is_label=True)
    if "derivatives" in location.split("/")[:-1]:
        return refuse(location, "derivative_image", "an image under derivatives/")
    reading = _read_contrast(location, name)
    return FileClaim(location=location, subject=subject, session=session, reading=reading)


def _read_contrast(location: str, name: BidsName) -> ContrastReading:
    if name.entities.get("part", "").lower() in ("phase", "real", "imag"):
        part = name.entities["part"]
        return ContrastReading(code="phase_image", reason=f"entity part-{part}, not a magnitude")
    reading = read_stated(name.suffix, where="BIDS suffix")
    if reading.code == "unknown_contrast":
        guess = read_name(location)
        reading = reading if guess.is_mask or guess.code == "unknown_contrast" else guess
    if reading.contrast == "T1w" and "ce" in name.entities:
        return read_stated("T1wCE", where="BIDS suffix and entity ce")
    return reading


def _is_brain_mask(name: BidsName) -> bool:
    return any("brain" in name.entities.get(key, "").lower() for key in ("label", "desc"))
