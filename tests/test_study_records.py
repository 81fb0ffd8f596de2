"""Records of a store as a sequence: parsed one by one, known by column before."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from anycontrast_datasets.record_json import record_to_json
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store import study_records
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.store.study_records import StudyRecords
from anycontrast_datasets.study import ShardError, StudyArrays

SETS = (("T1w", "FLAIR", "ADC"), ("T2w",), ("T1wCE", "T2starw"))


@pytest.fixture
def studies(study_of: Callable[..., StudyArrays]) -> list[StudyArrays]:
    codes = np.ones((8, 8, 8), dtype=np.int16)
    return [study_of(dict.fromkeys(names, codes), f"case-{n}") for n, names in enumerate(SETS)]


def test_records_are_parsed_when_asked_for_and_known_by_column_before(
    studies: list[StudyArrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_arrays(tmp_path / "shards", [studies])
    records = open_store(tmp_path / "shards").records
    assert isinstance(records, StudyRecords) and len(records) == 3
    with monkeypatch.context() as patch:
        patch.setattr(study_records, "record_from_json", lambda text: pytest.fail("parsed"))
        assert records.field("split").tolist() == ["train"] * 3
        assert records.field("study_id").tolist() == ["case-0", "case-1", "case-2"]
        assert records.contrasts == SETS
    assert records[-1] == studies[2].record and records[0] is records[0]
    assert records == tuple(study.record for study in studies) == records[:]
    assert records[1:] == tuple(records)[1:]
    assert pickle.loads(pickle.dumps(records)) == records
    with pytest.raises(IndexError):
        records[3]
    with pytest.raises(ShardError, match="has no nonsense"):
        records.field("nonsense")


def test_a_field_is_what_json_says_whatever_is_in_it(studies: list[StudyArrays]) -> None:
    odd = 'a "split":"val" \\ é \n'
    record = replace(studies[1].record, dataset=odd)
    texts = pa.chunked_array([[record_to_json(record)]])
    records = StudyRecords(texts, lambda: (("T2w",),))
    assert records.field("dataset").tolist() == [odd]
    assert records.field("split").tolist() == ["train"]
