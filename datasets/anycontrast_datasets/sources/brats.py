"""BraTS: one folder per case, one file per contrast, named by the case and a token.

In: `<case>/<case>_{t1,t1ce,t2,flair,seg}.nii.gz` (to 2021) or `<case>/<case>-{t1n,t1c,t2w,t2f,seg}`
(from 2023, where the last three digits of the case are the time point).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions, read_stated
from anycontrast_datasets.sources.grouping import build_studies
from anycontrast_datasets.sources.listing import list_images, refuse_format, stem
from anycontrast_datasets.study import Study

_NAME = re.compile(r"(?P<case>.+)[_-](?P<token>[A-Za-z0-9]+)")
_TIME_POINT = re.compile(r"(?P<subject>.+-\d{5})-(?P<session>\d{3})")
_LABEL_TOKENS = ("seg", "glistrboost", "mask")


def scan(root: Path, options: SourceOptions) -> Iterator[Study | Refusal]:
    """Yield the studies of a BraTS folder and a refusal for every other image in it.

    Raises:
        ManifestError: the folder is missing or cannot be listed.
    """
    claims = [claim_file(location) for location in list_images(root)]
    yield from build_studies(root, claims, options)


def claim_file(location: str) -> FileClaim | Refusal:
    """Return what the name of one image says, or why it cannot be placed."""
    if refusal := refuse_format(location):
        return refusal
    match = _NAME.fullmatch(stem(location))
    if match is None:
        reason = "the name must be <case>_<contrast> or <case>-<contrast>"
        return refuse(location, "no_subject", reason)
    subject, session = _subject(match["case"])
    if match["token"].lower() in _LABEL_TOKENS:
        return FileClaim(location=location, subject=subject, session=session, is_label=True)
    reading = read_stated(match["token"], where="BraTS token")
    return FileClaim(location=location, subject=subject, session=session, reading=reading)


def _subject(case: str) -> tuple[str, str]:
    match = _TIME_POINT.fullmatch(case)
    return (case, "") if match is None else (match["subject"], match["session"])
