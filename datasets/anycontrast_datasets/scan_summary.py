"""What a scan found, in counts: nothing in a summary names a file or a person."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from anycontrast_datasets.contrast_votes import confidence_level
from anycontrast_datasets.ledger import Refusal
from anycontrast_datasets.study import Study


@dataclass(frozen=True, kw_only=True)
class ScanSummary:
    """What a scan found, in files and studies."""

    inputs: int
    """Image files, and files that a table names but the folder does not have."""
    accepted: int
    refused: int
    studies: int
    subjects: int
    labels: int
    by_code: dict[str, int]
    """Refused files by reason code."""
    by_flag: dict[str, int]
    """Volumes by quality flag."""
    by_contrast: dict[str, int]
    by_contrast_set: dict[str, int]
    """Studies by their contrasts, e.g. `T1w+FLAIR`."""
    by_split: dict[str, int]
    by_face: dict[str, int] = field(default_factory=dict)
    """Volumes by face state."""
    by_confidence: dict[str, int] = field(default_factory=dict)
    """Volumes by how sure their contrast is: `high`, `medium`, `low`."""
    disagreements: int = 0
    """Volumes of which name, headers and picture say different things."""
    duplicates: int = 0
    """Volumes whose voxels are also those of a volume of another study."""
    near_duplicates: int = 0
    """Pairs of volumes of different studies that look alike, equal ones left out."""

    def __str__(self) -> str:
        return (
            f"{self.studies} studies of {self.subjects} subjects; {self.inputs} files: "
            f"{self.accepted} accepted, {self.refused} refused {self.by_code or ''}"
        ).rstrip()


def summarise(
    studies: Sequence[Study],
    refusals: Sequence[Refusal],
    stands_for: Mapping[str, Sequence[str]] | None = None,
) -> ScanSummary:
    """Count files and studies.

    Args:
        studies: accepted.
        refusals: one per refused file.
        stands_for: location of a converted volume -> the input files it was made of.
    """
    # Inside: these load scipy, which a configuration does not need.
    from anycontrast_datasets.duplicates import OTHER_SESSION, OTHER_SUBJECT

    volumes = [volume for study in studies for volume in study.volumes]
    accepted = len(accepted_files(studies, stands_for or {}))
    return ScanSummary(
        inputs=accepted + len(refusals),
        accepted=accepted,
        refused=len(refusals),
        studies=len(studies),
        subjects=len({study.subject_id for study in studies}),
        labels=sum(study.label is not None for study in studies),
        by_code=_counts(refusal.code for refusal in refusals),
        by_flag=_counts(flag for volume in volumes for flag in volume.flags),
        by_contrast=_counts(volume.contrast for volume in volumes),
        by_contrast_set=_counts("+".join(study.contrasts) for study in studies),
        by_split=_counts(study.split for study in studies),
        by_face=_counts(volume.face for volume in volumes),
        by_confidence=_counts(confidence_level(volume.confidence) for volume in volumes),
        disagreements=sum("contrast_disagreement" in volume.flags for volume in volumes),
        duplicates=sum(bool({OTHER_SESSION, OTHER_SUBJECT} & set(v.flags)) for v in volumes),
        near_duplicates=_count_near_duplicates(studies),
    )


def accepted_files(studies: Sequence[Study], stands_for: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the input files of studies; a converted volume stands for those it was made of."""
    taken = [volume.location for study in studies for volume in study.volumes]
    taken += [study.label.location for study in studies if study.label is not None]
    return [file for location in taken for file in stands_for.get(location, (location,))]


def _count_near_duplicates(studies: Sequence[Study]) -> int:
    from anycontrast_datasets.duplicates import near_duplicates

    held = [(study.study_id, volume) for study in studies for volume in study.volumes]
    pairs = near_duplicates([volume.image_hash for _, volume in held])
    return sum(
        held[i][0] != held[j][0] and held[i][1].voxels_sha256 != held[j][1].voxels_sha256
        for i, j, _ in pairs
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
