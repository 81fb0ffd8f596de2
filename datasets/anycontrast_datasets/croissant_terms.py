"""The words of a Croissant description: its context, and what the columns of our files mean.

Source: MLCommons Croissant format specification 1.1; Croissant RAI 1.0.
"""

from typing import Any

CONFORMS_TO = ("http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0")

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "description": {"@container": "@language"},
    "name": {"@container": "@language"},
    **{
        key: f"cr:{key}"
        for key in (
            *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract"),
            *("field", "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray"),
            *("isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
            *("references", "regex", "repeated", "replace", "samplingRate", "separator"),
            *("source", "subField", "transform"),
        )
    },
}

# Name, type, length of an array (empty: one value), meaning.
Column = tuple[str, str, str, str]
STUDY: tuple[Column, ...] = (
    ("study_id", "sc:Text", "", "Keyed pseudonym, unique."),
    ("dataset", "sc:Text", "", "Name of the collection."),
    ("subject_id", "sc:Text", "", "Keyed pseudonym of the person."),
    ("session_id", "sc:Text", "", "Keyed pseudonym of the session."),
    ("split", "sc:Text", "", "train, val or test, decided by the subject alone."),
    ("site", "sc:Text", "", "Keyed hash of scanner and institution; empty when not known."),
    ("contrast_set", "sc:Integer", "", "Bit n: a volume of the contrast with vocabulary id n."),
)
VOLUME: tuple[Column, ...] = (
    ("contrast", "sc:Text", "", "What the volume shows."),
    ("shape", "sc:Integer", "3", "Voxels along the axes of the source file."),
    ("spacing_mm", "sc:Float", "3", "Voxel spacing in mm along the same axes."),
    ("affine", "sc:Float", "16", "4 x 4 row by row: voxel index to RAS+ mm."),
    ("confidence", "sc:Float", "", "Of the contrast, 0 to 1."),
    ("face", "sc:Text", "", "stripped, defaced, refaced, present or unknown."),
    ("flags", "sc:Text", "-1", "Quality flags."),
    ("sha256", "sc:Text", "", "Of the source file."),
)
MEMBER: tuple[Column, ...] = (
    ("study_id", "sc:Text", "", "Study that the member belongs to."),
    ("contrast", "sc:Text", "", "What the member holds: a contrast, label, or study.json."),
    ("shard", "sc:Text", "", "File that holds the member."),
    ("offset", "sc:Integer", "", "First byte of the member in the shard."),
    ("bytes", "sc:Integer", "", "Length of the member."),
    ("xxh3_64", "sc:Text", "", "Checksum of the member's bytes."),
    ("shape", "sc:Integer", "-1", "Voxels of the common grid."),
    ("dtype", "sc:Text", "", "int16 codes, uint8 labels, or json."),
)
