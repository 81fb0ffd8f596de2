"""Metrics: sums over packs and ranks, one line a step, TensorBoard beside it."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from anycontrast.training import metrics
from anycontrast.training.metrics import Meter, MetricsWriter, read_metrics
from anycontrast.training.task import Micro, Parts


def micro(count: int, tokens: int, studies: int) -> Micro:
    return Micro(None, count, tokens, tuple(f"s{n}" for n in range(studies)))


def part(total: float, count: float) -> Parts:
    return {"loss": (torch.tensor(total), torch.tensor(count))}


def test_a_mean_is_over_counts_not_over_packs() -> None:
    meter = Meter()
    micros = [micro(1, 10, 1), micro(3, 30, 2)]
    meter.add_step(micros, [part(8.0, 1), part(6.0, 3)], data_wait_s=0.5, is_applied=True)
    meter.add_step([micro(4, 40, 1)], [part(2.0, 4)], data_wait_s=1.5, is_applied=True)
    values = meter.flush()
    assert values["loss"] == pytest.approx(16 / 8)
    assert values["data_wait_s"] == pytest.approx(1.0)
    assert values["tokens_per_s"] == pytest.approx(20 * values["studies_per_s"])
    assert "loss" not in meter.flush()


def test_a_skipped_step_spoils_no_mean() -> None:
    meter = Meter()
    meter.add_step([micro(1, 1, 1)], [part(math.nan, 1)], data_wait_s=0, is_applied=False)
    meter.add_step([micro(1, 1, 1)], [part(3.0, 1)], data_wait_s=0, is_applied=True)
    assert meter.flush()["loss"] == 3.0


def test_a_contrast_only_one_rank_saw_is_in_the_run_s_line() -> None:
    def of_rank(sums: dict[str, tuple[float, float]], wait_s: float) -> dict[str, object]:
        return {
            "sums": sums,
            "tokens": 10,
            "studies": 1,
            "steps": 1,
            "waited_s": wait_s,
            "mix": Counter(),
            "elapsed_s": 2.0,
            "memory_bytes": 100 * wait_s,
        }

    ranks = [
        of_rank({"loss": (4.0, 2.0), "loss/contrast/DWI": (4.0, 2.0)}, 1.0),
        of_rank({"loss": (6.0, 8.0), "loss/contrast/ADC": (6.0, 8.0)}, 3.0),
    ]
    values = metrics._combine(ranks)
    assert values["loss"] == pytest.approx(1.0)
    assert values["loss/contrast/DWI"] == pytest.approx(2.0)
    assert values["loss/contrast/ADC"] == pytest.approx(0.75)
    assert (values["tokens_per_s"], values["studies_per_s"]) == (10.0, 1.0)
    assert (values["data_wait_s"], values["memory_bytes"]) == (3.0, 300.0)
    assert values["step_s"] == 2.0


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricsWriter(tmp_path, start_step=2) as writer:
        writer.write(3, {"loss": 30.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_value_that_is_not_finite_stays_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"grad_norm": math.inf})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["grad_norm"] is None


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss/contrast/FLAIR": 0.5})
        writer.write(2, {"loss/contrast/FLAIR": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss/contrast/FLAIR")
    assert [(event.step, event.value) for event in scalars] == [(1, 0.5), (2, 0.25)]


def test_the_mix_is_a_share_of_studies_over_all_steps_and_only_frequent_sets_are_logged() -> None:
    meter = Meter()
    sets = {f"set/{n}": 100 - n for n in range(30)}
    for mix in ({"dataset/a": 30, "contrast/T1w": 40, **sets}, {"dataset/a": 10, "dataset/b": 60}):
        meter.add_step([], [], data_wait_s=0.0, is_applied=True, mix=mix)
    values = meter.flush()
    assert values["mix/dataset/a"] == 0.4
    assert values["mix/dataset/b"] == 0.6
    assert values["mix/contrast/T1w"] == 0.4
    logged = {name for name in values if name.startswith("mix/set/")}
    assert logged == {f"mix/set/{n}" for n in range(20)}
    assert not any(name.startswith("mix/") for name in meter.flush())


def test_the_wait_is_a_share_of_the_time_too() -> None:
    meter = Meter()
    meter.add_step([], [], data_wait_s=0.0, is_applied=True)
    assert meter.flush()["data_wait_share"] == 0.0
    own = {"sums": {}, "tokens": 0, "studies": 0, "memory_bytes": 0, "mix": Counter()}
    ranks = [{**own, "steps": 1, "waited_s": w, "elapsed_s": e} for w, e in ((1, 4), (2, 3))]
    assert metrics._combine(ranks)["data_wait_share"] == 0.5
