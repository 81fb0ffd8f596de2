"""Safe values out of a parsed DICOM header: numbers, words of fixed lists, a few texts.

In: a header that holds the tags of `dicom_tags.KEPT_TAGS`. Out: finite numbers; words of fixed
lists; physics with the keys and units of a BIDS sidecar. Texts are for grouping and voting in
memory and are written nowhere. Functional groups of enhanced objects are read in the same way.

Source: DICOM PS3.3 C.7.6.16 (functional groups), C.8.3.1 and C.8.13 (MR).
"""

import math
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from anycontrast_datasets.sources import dicom_tags as tags

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_TEXT = 256
"""Characters of a text that are looked at; no VR of the list may hold more than 64."""

_DIMENSIONS, _YES_OR_NO = re.compile("[123]D"), re.compile("YES|NO")
_ECHO_PULSES = {"GRADIENT": ("GR",), "SPIN": ("SE",), "BOTH": ("SE", "GR")}
_NO_AGENT = {"none", "no", "n", "without", "false", "n/a", "na", "0", "unknown"}
# Largest value that is believed: milliseconds, degrees, tesla, s/mm^2.
_MAX_MS, _MAX_B = 60_000.0, 50_000.0


def text(dataset: "Dataset", keyword: str) -> str:
    """Return a text without padding, empty when missing; backslashes part several values."""
    value = dataset.get(keyword)
    if value is None:
        return ""
    parts = value if _is_multiple(value) else [value]
    joined = "\\".join(str(part) for part in parts)
    # Interned: a million slices repeat the texts of a few thousand series.
    return sys.intern(joined.strip(" \0")[:MAX_TEXT])


def number(dataset: "Dataset", keyword: str) -> float | None:
    """Return a finite number, the first of several, None when there is none."""
    found = numbers(dataset, keyword)
    return found[0] if found else None


def whole(dataset: "Dataset", keyword: str) -> int | None:
    """Return a number as an integer, None when there is none."""
    found = number(dataset, keyword)
    return None if found is None or abs(found) > 2**31 else int(found)


def numbers(dataset: "Dataset", keyword: str, count: int | None = None) -> tuple[float, ...]:
    """Return finite numbers, empty when missing, not numbers, or not `count` of them."""
    value = dataset.get(keyword)
    if value is None or isinstance(value, bytes):
        return ()
    try:
        found = tuple(float(part) for part in (value if _is_multiple(value) else [value]))
    except (TypeError, ValueError):
        return ()
    usable = all(math.isfinite(part) for part in found) and count in (None, len(found))
    return found if usable else ()


def words(dataset: "Dataset", keyword: str, allowed: re.Pattern[str]) -> tuple[str, ...]:
    """Return the words of a coded text that are in a list, in upper case, blanks as `_`."""
    found = re.split(r"[\\/]", text(dataset, keyword).upper())
    cleaned = (re.sub(r"[^A-Z0-9]+", "_", word).strip("_") for word in found)
    return tuple(word for word in cleaned if allowed.fullmatch(word))


def first_item(dataset: "Dataset", keyword: str) -> "Dataset | None":
    """Return the first item of a sequence, None when it is missing or empty."""
    found: Any = dataset.get(keyword)
    if not isinstance(found, list) and not _is_multiple(found):
        return None
    return found[0] if len(found) else None


def group_item(groups: Iterable["Dataset | None"], keyword: str) -> "Dataset | None":
    """Return the first item of a functional group: the frame's own before the shared one."""
    items = (first_item(group, keyword) for group in groups if group is not None)
    return next((item for item in items if item is not None), None)


def private_b_value(dataset: "Dataset") -> float | None:
    """Return the b-value of a classic image from its vendor's private block, in s/mm^2."""
    for group, element, creator in tags.PRIVATE_B_VALUES:
        for block in range(0x10, 0x13):
            holder = dataset.get((group, block))
            if holder is None or str(holder.value).strip() != creator:
                continue
            found = dataset.get((group, (block << 8) + element))
            values = () if found is None else _loose_numbers(found.value)
            if values:
                # GE adds 1e9 to mark a sequence, and like Philips writes 0 into any other image.
                b_value = believed(values[0] % 1e5)
                return b_value if b_value or creator.startswith("SIEMENS") else None
    return None


def private_tags() -> list[tuple[int, int]]:
    """Return every tag that `private_b_value` may look at."""
    blocks = range(0x10, 0x13)
    return [
        tag
        for group, element, _ in tags.PRIVATE_B_VALUES
        for block in blocks
        for tag in ((group, block), (group, (block << 8) + element))
    ]


def believed(b_value: float | None) -> float | None:
    """Return a b-value that can be one, else None."""
    return b_value if b_value is not None and 0 <= b_value <= _MAX_B else None


def read_sidecar(
    dataset: "Dataset", groups: tuple["Dataset | None", ...], b_value: float | None
) -> dict[str, object]:
    """Return the physics of an image with the keys and units of a BIDS sidecar.

    Only numbers, and words of fixed lists.

    Args:
        dataset: the header.
        groups: functional groups of one frame, its own first; empty for a classic image.
        b_value: of the stack, s/mm^2.
    """
    found: dict[str, object] = {}
    for key, item_keyword, keyword in _TIMES:
        holder = group_item(groups, item_keyword) if groups else dataset
        value = None if holder is None else number(holder, keyword if groups else key)
        if value is not None and 0 < value <= _MAX_MS:
            found[key] = round(value / 1000.0, 6)
    timing = group_item(groups, "MRTimingAndRelatedParametersSequence") if groups else dataset
    for keyword, largest in (("FlipAngle", 360.0), ("EchoTrainLength", 4096.0)):
        value = None if timing is None else number(timing, keyword)
        if value is not None and 0 < value <= largest:
            found[keyword] = round(value, 3)
    field_t = number(dataset, "MagneticFieldStrength")
    if field_t is not None and 0 < field_t <= 25:
        found["MagneticFieldStrength"] = field_t
    if b_value is not None:
        found["DiffusionBValue"] = b_value
    return found | _coded(dataset, groups)


_TIMES = (
    ("EchoTime", "MREchoSequence", "EffectiveEchoTime"),
    ("RepetitionTime", "MRTimingAndRelatedParametersSequence", "RepetitionTime"),
    ("InversionTime", "MRModifierSequence", "InversionTimes"),
)


def _coded(dataset: "Dataset", groups: tuple["Dataset | None", ...]) -> dict[str, object]:
    sequence = words(dataset, "ScanningSequence", tags.SEQUENCES)
    if not sequence:
        sequence = _ECHO_PULSES.get(text(dataset, "EchoPulseSequence").upper(), ())
        modifier = group_item(groups, "MRModifierSequence")
        if modifier is not None and text(modifier, "InversionRecovery").upper() == "YES":
            sequence = (*sequence, "IR")
        if text(dataset, "EchoPlanarPulseSequence").upper() == "YES":
            sequence = (*sequence, "EP")
    named = text(dataset, "SequenceName") or text(dataset, "PulseSequenceName")
    agent = _agent(dataset)
    coded: dict[str, object] = {
        "ImageType": list(words(dataset, "ImageType", tags.IMAGE_TYPES)),
        "ScanningSequence": "\\".join(sequence),
        "SequenceVariant": "\\".join(words(dataset, "SequenceVariant", tags.VARIANTS)),
        "SequenceName": "_".join(tags.SEQUENCE_WORDS.findall(named.lower())),
        "MRAcquisitionType": "".join(words(dataset, "MRAcquisitionType", _DIMENSIONS)),
        "ContrastBolusAgent": agent,
        "RecognizableVisualFeatures": "".join(
            words(dataset, "RecognizableVisualFeatures", _YES_OR_NO)
        ),
        "DeidentificationMethod": "\\".join(
            tags.FACE_TOOLS.findall(text(dataset, "DeidentificationMethod").lower())
        ),
    }
    codes = dataset.get("DeidentificationMethodCodeSequence") or ()
    if any(text(code, "CodeValue") == tags.CLEANED_FEATURES for code in codes):
        coded["DeidentificationMethodCodeSequence"] = tags.CLEANED_FEATURES
    return {key: value for key, value in coded.items() if value}


def _agent(dataset: "Dataset") -> str:
    """Return `yes` or `no` for a contrast agent, empty when the header does not say."""
    if first_item(dataset, "ContrastBolusAgentSequence") is not None:
        return "yes"
    stated = text(dataset, "ContrastBolusAgent").lower()
    return "" if not stated else "no" if stated in _NO_AGENT else "yes"


def _is_multiple(value: object) -> bool:
    from pydicom.multival import MultiValue
    from pydicom.sequence import Sequence

    return isinstance(value, list | tuple | MultiValue | Sequence)


def _loose_numbers(value: object) -> tuple[float, ...]:
    """Return numbers of an element whose type is not known, as private ones in implicit VR are."""
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").strip(" \0").split("\\")
    try:
        parts: Any = value if _is_multiple(value) else [value]
        found = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        return ()
    return found if all(math.isfinite(part) for part in found) else ()
