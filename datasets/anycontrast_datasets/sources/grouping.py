"""From claims about files to studies: open every file once, group, and account for every one.

In: what a source says about its files. Out: studies and refusals, such that every file is in
exactly one of them. Files are read by a few threads; the output does not depend on how many.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.ledger import Refusal, refuse
from anycontrast_datasets.mapping import REFUSE
from anycontrast_datasets.pseudonym import Identity
from anycontrast_datasets.sidecars import Sidecar, SidecarReader, allowed, in_seconds
from anycontrast_datasets.sources.claims import FileClaim, SourceOptions, read_stated
from anycontrast_datasets.sources.inspection import DISAGREEMENT, Inspected, inspect
from anycontrast_datasets.sources.inspection_cache import InspectionCache
from anycontrast_datasets.study import Study, Volume

_Outcome = Inspected | Refusal


def build_studies(
    root: Path, claims: Sequence[FileClaim | Refusal], options: SourceOptions
) -> Iterator[Study | Refusal]:
    """Yield the refusals that came with the claims, then the studies and refusals of each session.

    Args:
        root: Folder that locations are relative to.
        claims: One per file of the source, in any order.
        options: Naming, contrasts to keep, limits.
    """
    decided = [_decide(claim, options) for claim in claims]
    refused = [claim for claim in decided if isinstance(claim, Refusal)]
    claimed = [claim for claim in decided if isinstance(claim, FileClaim)]
    claimed.sort(key=lambda c: (c.subject, c.session, c.location))
    done = len(refused)
    _report(options, done, len(claims))
    yield from refused
    inspector = _Inspector(root, options)
    executor = ThreadPoolExecutor(max_workers=options.num_threads)
    try:
        pending = {c.location: executor.submit(inspector, c) for c in claimed}
        for (subject, session), group in groupby(claimed, key=lambda c: (c.subject, c.session)):
            outcomes = []
            for claim in group:
                outcomes.append(pending.pop(claim.location).result())
                done += 1
                _report(options, done, len(claims))
            inspector.cache.save_if_due()
            yield from _assemble(options.dataset, options.naming(subject, session), outcomes)
    finally:
        executor.shutdown(cancel_futures=True)
        inspector.cache.save(is_whole=done == len(claims))


def _decide(claim: FileClaim | Refusal, options: SourceOptions) -> FileClaim | Refusal:
    """Apply what a person decided: a withdrawn subject, a row of the mapping table."""
    if isinstance(claim, Refusal):
        return claim
    identity = options.naming(claim.subject, claim.session)
    if identity.subject_id in options.withdrawn:
        reason = "the subject has withdrawn"
        return refuse(claim.location, "withdrawn", reason, study_id=identity.study_id)
    names = (claim.location, *claim.source_files)
    decision = next((options.decisions[n] for n in names if n in options.decisions), "")
    if decision == REFUSE:
        reason = "refused in the mapping table"
        return refuse(claim.location, "refused_by_person", reason, study_id=identity.study_id)
    if not decision or claim.is_label:
        return claim
    stated = read_stated(decision, where="mapping")
    reading = replace(
        stated,
        evidence=(*stated.evidence, *claim.reading.evidence),
        votes=(*stated.votes, *claim.reading.votes),
    )
    return replace(claim, reading=reading, is_stated=True)


class _Inspector:
    """Inspects files, or says what an earlier scan found in a file that has not changed."""

    def __init__(self, root: Path, options: SourceOptions) -> None:
        self._root = root
        self._options = options
        self._sidecars = SidecarReader(root)
        self.cache = InspectionCache(options)

    def __call__(self, claim: FileClaim) -> _Outcome:
        sidecar = self._sidecar(claim)
        key = self.cache.key(self._root, claim, sidecar)
        outcome = self.cache.get(key, claim)
        if outcome is None:
            outcome = inspect(self._root, claim, sidecar, self._options)
        self.cache.put(key, outcome)
        return outcome

    def _sidecar(self, claim: FileClaim) -> Sidecar:
        if claim.sidecar is None:
            return self._sidecars.read(claim.location)
        values, is_milliseconds = in_seconds(allowed(claim.sidecar))
        return Sidecar(values=values, is_milliseconds=is_milliseconds)


def _report(options: SourceOptions, done: int, total: int) -> None:
    if options.on_progress is not None:
        options.on_progress(done, total)


def _assemble(
    dataset: str, identity: Identity, outcomes: Sequence[_Outcome]
) -> Iterator[Study | Refusal]:
    """Yield at most one study, and a refusal for every file that is not in it."""
    yield from (outcome for outcome in outcomes if isinstance(outcome, Refusal))
    usable = [outcome for outcome in outcomes if isinstance(outcome, Inspected)]
    usable, refused = _without_equal_voxels(usable, identity.study_id)
    yield from refused
    volumes, refused = _one_per_contrast(usable, identity.study_id)
    yield from refused
    label, refused = _choose_label(usable, volumes, identity.study_id)
    yield from refused
    if not volumes:
        return
    yield Study(
        study_id=identity.study_id,
        dataset=dataset,
        subject_id=identity.subject_id,
        session_id=identity.session_id,
        split=identity.split,
        volumes=tuple(_volume(found) for found in volumes),
        label=None if label is None else label.label,
        site=next((found.site for found in volumes if found.site), ""),
    )


def _volume(found: Inspected) -> Volume:
    assert found.volume is not None, "only files inspected as volumes are volumes of a study"
    return found.volume


def _without_equal_voxels(
    usable: Sequence[Inspected], study_id: str
) -> tuple[list[Inspected], list[Refusal]]:
    """Keep one of several files with the same voxels: the surest contrast, then the first."""
    kept: dict[str, Inspected] = {}
    for found in usable:
        if found.volume is not None:
            content = found.volume.voxels_sha256
            if content not in kept or found.volume.confidence > _volume(kept[content]).confidence:
                kept[content] = found
    refused = [
        refuse(
            found.claim.location,
            "duplicate_volume",
            f"the same voxels as {kept[found.volume.voxels_sha256].claim.location}",
            study_id=study_id,
        )
        for found in usable
        if found.volume is not None and kept[found.volume.voxels_sha256] is not found
    ]
    chosen = {id(found) for found in kept.values()}
    return [f for f in usable if f.volume is None or id(f) in chosen], refused


def _one_per_contrast(
    usable: Sequence[Inspected], study_id: str
) -> tuple[list[Inspected], list[Refusal]]:
    """Keep one file per contrast, in vocabulary order; several of one contrast are ambiguous.

    Where exactly one of them has name and picture in agreement, it is not: that one is kept.
    """
    by_contrast: dict[str, list[Inspected]] = defaultdict(list)
    for found in usable:
        if found.volume is not None:
            by_contrast[found.volume.contrast].append(found)
    kept: list[Inspected] = []
    refused: list[Refusal] = []
    for contrast, files in sorted(by_contrast.items(), key=lambda item: contrast_id(item[0])):
        agreeing = [found for found in files if DISAGREEMENT not in _volume(found).flags]
        chosen = files if len(files) == 1 else agreeing if len(agreeing) == 1 else []
        kept += chosen
        names = sorted(found.claim.location for found in files)
        reason = f"{len(files)} files are {contrast} of one session: {', '.join(names)}"
        refused += [
            refuse(found.claim.location, "duplicate_contrast", reason, study_id=study_id)
            for found in files
            if found not in chosen
        ]
    return kept, refused


def _choose_label(
    usable: Sequence[Inspected], volumes: Sequence[Inspected], study_id: str
) -> tuple[Inspected | None, list[Refusal]]:
    """Return the one label whose grid is the grid of a volume, and refusals for the others."""
    labels = [found for found in usable if found.label is not None]
    if not volumes:
        reason = "no volume of its study was accepted"
        return None, [_refuse_label(found, "no_volume_left", reason, study_id) for found in labels]
    placed: list[Inspected] = []
    refused: list[Refusal] = []
    for found in labels:
        grid_of = next((_volume(v).contrast for v in volumes if v.grid.equals(found.grid)), None)
        if grid_of is None or found.label is None:
            refused.append(
                _refuse_label(found, "mask_grid_mismatch", _grids(found, volumes), study_id)
            )
        else:
            placed.append(replace(found, label=replace(found.label, grid_of=grid_of)))
    if len(placed) > 1:
        reason = f"{len(placed)} label files for one session"
        refused += [_refuse_label(found, "duplicate_label", reason, study_id) for found in placed]
        return None, refused
    return (placed[0] if placed else None), refused


def _refuse_label(found: Inspected, code: str, reason: str, study_id: str) -> Refusal:
    return refuse(found.claim.location, code, reason, study_id=study_id)


def _grids(label: Inspected, volumes: Sequence[Inspected]) -> str:
    others = ", ".join(f"{_volume(v).contrast} {v.grid.shape}" for v in volumes)
    return (
        f"the label's grid {label.grid.shape} (RAS+ axes) must equal the grid of a volume in shape "
        f"and affine; volumes: {others}"
    )
