"""What kind of picture a DICOM file holds, and which kinds are not learned from.

In: an `Instance`. Out: None for a magnitude image or a map of the vocabulary, else a refusal. Only
coded header values decide here; the words of a description are the contrast vote's, except for
localizers, which scanners often name and seldom code.

Source: DICOM PS3.3 C.7.6.1.1.2 (ImageType), C.8.13 (enhanced MR), PS3.4 B.5 (SOP classes).
"""

import re

from anycontrast_datasets.contrast_votes import guess_from_description
from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.sources.dicom_header import Instance

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_PHASE = frozenset(("P", "PHASE", "PHASE_MAP", "B0_MAP", "R", "REAL", "I", "IMAGINARY"))
_COMPONENTS = frozenset(("PHASE", "REAL", "IMAGINARY"))
# Projections, reformats, pictures of screens, and maps without a place in the vocabulary.
_NOT_LEARNED = re.compile(
    "MIP|MINIP|MNIP|MPR|CSA_MPR|PROJECTION|PROJECTION_IMAGE|REFORMATTED|RESAMPLED|CSA_RESAMPLED|"
    "SUBTRACT|SUBTRACTION|SCREEN|SCREENSAVE|SCREEN_SAVE|CAPTURE|VOLUME_RENDER|MONTAGE|RGB|COLFA|"
    "TENSOR|EADC|CBV|RELCBV|MTT|RELMTT|TTP|T1_MAP|T2_MAP|T2_STAR_MAP|RHO|STDDEV"
)


def refuse_kind(instance: Instance) -> Refusal | None:
    """Return why a file is not learned from by its kind, None when it may be."""
    for code, reason in (
        _not_mri(instance),
        _burnt_in(instance),
        _not_trainable(instance),
        _phase(instance),
        _localizer(instance),
    ):
        if code:
            return refuse(instance.location, code, reason)
    return None


def _not_mri(instance: Instance) -> tuple[str, str]:
    if not instance.is_mri:
        return "not_mri", "the header states another kind of image than MR"
    return "", ""


def _burnt_in(instance: Instance) -> tuple[str, str]:
    if instance.burnt_in == "YES":
        return "burnt_in_text", "the header states text in the picture"
    if instance.sop_class.startswith(_SECONDARY_CAPTURE) and instance.burnt_in != "NO":
        return "burnt_in_text", "a screen capture that does not state to be free of text"
    return "", ""


def _not_trainable(instance: Instance) -> tuple[str, str]:
    code = "not_trainable"
    if instance.sop_class.startswith(_SECONDARY_CAPTURE):
        return code, "a screen capture"
    if not (instance.rows and instance.columns):
        return code, "an object without a picture (spectroscopy, raw data, a report)"
    if instance.is_colour:
        return code, "a colour picture"
    told = [word for word in instance.image_type if _NOT_LEARNED.fullmatch(word)]
    if "MEAN" in instance.image_type and "DERIVED" in instance.image_type:
        told = [*told, "MEAN"]
    return (code, f"ImageType {told[0]}") if told else ("", "")


def _phase(instance: Instance) -> tuple[str, str]:
    told = sorted(_PHASE.intersection(instance.image_type[2:]))
    if told or instance.component in _COMPONENTS:
        return "phase_image", f"{told[0] if told else instance.component}, not a magnitude"
    return "", ""


def _localizer(instance: Instance) -> tuple[str, str]:
    if "LOCALIZER" in instance.image_type:
        return "localizer", "ImageType LOCALIZER"
    guess = guess_from_description(instance.description)
    return ("localizer", "; ".join(guess.evidence)) if guess.is_localizer else ("", "")
