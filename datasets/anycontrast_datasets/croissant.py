"""Describe a data set in Croissant, the JSON-LD that dataset search engines and loaders read.

In: a manifest folder and, if there are any, its shards. Out: one file that names the files with
their checksums, the columns of the manifest and of the shard index, the splits with their counts,
and the rights. It holds no record of a study, no path and nothing of the private folder.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anycontrast_datasets.croissant_terms import (
    CONFORMS_TO,
    CONTEXT,
    MEMBER,
    STUDY,
    VOLUME,
    Column,
)
from anycontrast_datasets.files import sha256_file, write_atomically
from anycontrast_datasets.manifest_schema import MANIFEST_NAME
from anycontrast_datasets.manifest_table import ManifestTable
from anycontrast_datasets.store.byte_source import LocalSource
from anycontrast_datasets.store.volume_index import INDEX_NAME, read_dataset
from anycontrast_datasets.study import SPLITS, ShardError, StudyError

PARQUET = "application/x-parquet"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def export_croissant(
    manifest_dir: Path,
    shards_dir: Path | None,
    out: Path,
    *,
    name: str,
    licence: str | None = None,
    description: str = "",
    version: str = "1.0.0",
    cite_as: str = "",
    url: str = "",
    date_published: str = "",
    base_url: str = "",
) -> Path:
    """Write the Croissant description of a data set.

    Args:
        manifest_dir: Folder that `scan` wrote.
        shards_dir: Folder that `shard` wrote; None describes the manifest alone.
        out: File to write, usually `croissant.json`.
        name: Of the data set.
        licence: SPDX identifier, e.g. `CC-BY-4.0`.
        description: One paragraph; empty makes one of the counts.
        version: Of the data set, MAJOR.MINOR.PATCH.
        cite_as: How to cite it.
        url: Its home page.
        date_published: ISO date.
        base_url: What precedes the names of the files, ending with `/`; empty for relative names.

    Returns:
        `out`.

    Raises:
        ManifestError: the manifest cannot be used.
        ShardError: the shards cannot be used, or were made from another manifest.
        StudyError: no name, or a licence that is no SPDX identifier.
    """
    if not name.strip():
        raise StudyError("croissant: name must not be empty; set croissant.name")
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise StudyError(
            f"croissant: licence must be an SPDX identifier, got {licence!r}; set "
            "croissant.licence to one such as CC-BY-4.0"
        )
    table = ManifestTable.open(manifest_dir / MANIFEST_NAME)
    shards = None if shards_dir is None else _shard_facts(shards_dir, table)
    document = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(CONFORMS_TO),
        "name": name,
        "description": description or _describe(table),
        "version": version,
        "identifier": f"anycontrast-manifest:{table.fingerprint}",
        "keywords": ["MRI", "brain", *table.count_by_contrast()],
        **({"license": f"https://spdx.org/licenses/{licence}"} if licence else {}),
        **{
            key: value
            for key, value in (
                ("citeAs", cite_as),
                ("url", url),
                ("datePublished", date_published),
            )
            if value
        },
        "rai:personalSensitiveInformation": (
            "Health data. Names, dates and free text are left out; ids are keyed pseudonyms. What "
            "is known of a face in a volume is in its field `face`."
        ),
        "distribution": _distribution(manifest_dir / MANIFEST_NAME, shards, base_url),
        "recordSet": [
            _splits(table),
            _studies(),
            *([_members()] if shards else []),
        ],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(out, text.encode())
    return out


def _shard_facts(folder: Path, table: ManifestTable) -> dict[str, Any]:
    dataset = read_dataset(LocalSource(folder))
    if dataset.get("manifest_fingerprint") != table.fingerprint:
        raise ShardError(
            f"describing {folder}: the shards were made from another manifest than {table.name}; "
            "run `anycontrast shard` again"
        )
    if not isinstance(dataset.get("shards"), list):
        raise ShardError(f"describing {folder}: only volume stores are described, got another kind")
    return dataset


def _describe(table: ManifestTable) -> str:
    contrasts = ", ".join(f"{name} {count}" for name, count in table.count_by_contrast().items())
    return (
        f"Brain MRI: {len(table)} studies with {int(table.num_volumes.sum())} volumes "
        f"({contrasts}); any study has any subset of the contrasts."
    )


def _distribution(
    manifest: Path, shards: Mapping[str, Any] | None, base_url: str
) -> list[dict[str, Any]]:
    files = [
        _file_object(
            MANIFEST_NAME, PARQUET, sha256_file(manifest), manifest.stat().st_size, base_url
        )
    ]
    if shards is None:
        return files
    archives = [
        _file_object(shard["name"], "application/x-tar", shard["sha256"], shard["bytes"], base_url)
        for shard in shards["shards"]
    ]
    index = _file_object(INDEX_NAME, PARQUET, shards["index_sha256"], None, base_url)
    inside = [{"@id": archive["@id"]} for archive in archives]
    sets = [
        ("codes", "*.i16b2", "application/octet-stream", "int16 voxels, Blosc, one per contrast."),
        ("labels", "*.label.u8b2", "application/octet-stream", "uint8 voxel labels, Blosc."),
        ("records", "*.study.json", "application/json", "Grid and intensity scale of a study."),
    ]
    return [
        *files,
        index,
        *archives,
        *(
            {
                "@type": "cr:FileSet",
                "@id": name,
                "name": name,
                "description": meaning,
                "containedIn": inside,
                "encodingFormat": kind,
                "includes": pattern,
            }
            for name, pattern, kind, meaning in sets
        ),
    ]


def _file_object(
    name: str, kind: str, sha256: str, num_bytes: int | None, base_url: str
) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": f"{base_url}{name}",
        "encodingFormat": kind,
        **({} if num_bytes is None else {"contentSize": f"{num_bytes} B"}),
        "sha256": sha256,
    }


def _splits(table: ManifestTable) -> dict[str, Any]:
    column = {"@type": "cr:Field", "dataType": "sc:Text"}
    return {
        "@type": "cr:RecordSet",
        "@id": "splits",
        "name": "splits",
        "description": "All sessions of a subject are in one split.",
        "dataType": "cr:Split",
        "key": {"@id": "splits/name"},
        "field": [
            {**column, "@id": "splits/name", "name": "name"},
            {**column, "@id": "splits/studies", "name": "studies", "dataType": "sc:Integer"},
        ],
        "data": [
            {"splits/name": split, "splits/studies": len(table.select(split=split))}
            for split in SPLITS
        ],
    }


def _studies() -> dict[str, Any]:
    studies = _record_set("studies", "One record per scanning session.", STUDY, MANIFEST_NAME)
    for field in studies["field"]:
        if field["name"] == "split":
            field["references"] = {"field": {"@id": "splits/name"}}
    volumes = {
        "@type": "cr:Field",
        "@id": "studies/volumes",
        "name": "volumes",
        "description": "The study's volumes, each of another contrast.",
        "isArray": True,
        "arrayShape": "-1",
        "subField": _fields("studies/volumes", VOLUME, MANIFEST_NAME, nested_in="volumes"),
    }
    return {**studies, "key": {"@id": "studies/study_id"}, "field": [*studies["field"], volumes]}


def _members() -> dict[str, Any]:
    meaning = "Where every part of a study is stored."
    return _record_set("members", meaning, MEMBER, INDEX_NAME)


def _record_set(
    name: str, description: str, columns: Sequence[Column], file: str
) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "field": _fields(name, columns, file),
    }


def _fields(
    prefix: str, columns: Sequence[Column], file: str, *, nested_in: str = ""
) -> list[dict[str, Any]]:
    fields = []
    for name, kind, length, meaning in columns:
        source: dict[str, Any] = {
            "fileObject": {"@id": file},
            "extract": {"column": nested_in or name},
        }
        if nested_in:
            source["transform"] = {"jsonPath": f"$[*].{name}"}
        fields.append(
            {
                "@type": "cr:Field",
                "@id": f"{prefix}/{name}",
                "name": name,
                "description": meaning,
                "dataType": kind,
                **({"isArray": True, "arrayShape": length} if length else {}),
                "source": source,
            }
        )
    return fields
