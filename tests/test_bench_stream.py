"""The stream benchmark: every way is run, and the bars say what they came to."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from anycontrast.bench import stream
from anycontrast.bench.stream import StreamBenchConfig
from anycontrast.bench.studies import BenchStudies
from anycontrast_datasets.intensity import pack_occupancy
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.study import StudyArrays


def test_every_way_is_timed_and_the_bars_are_json(
    tmp_path: Path, study_of: Callable[..., StudyArrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {name: np.ones((32, 32, 32), dtype=np.int16) for name in ("T1w", "FLAIR")}
    bitmap = pack_occupancy(codes["T1w"])
    studies = [study_of(codes, f"case-{n}", occupancy=bitmap) for n in range(2)]
    write_arrays(tmp_path / "shards", [studies])
    made = BenchStudies((), tmp_path / "shards")
    monkeypatch.setattr(stream, "bench_studies", lambda folder, num_studies: made)
    config = StreamBenchConfig(num_studies=2, studies_per_step=1, rounds=2)
    found = json.loads(json.dumps(stream.run(config)))
    ways = ("store_read", "store_read_into_slots", "stream_1_thread", "stream_2_threads")
    assert list(found["ms_per_study"]) == list(ways)
    assert all(times["wall_ms"] > 0 for times in found["ms_per_study"].values())
    assert set(found["cold_mb_per_s"]) == {"plain_cold", "stream_cold", "stream_warm"}
    for bar in found["bars"].values():
        assert set(bar) == {"value", "bar", "met"} and isinstance(bar["met"], bool)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"studies_per_step": 3}, {"studies_per_step": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StreamBenchConfig(**wrong)  # type: ignore[arg-type]
