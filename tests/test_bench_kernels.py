import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from anycontrast_kernels.bench import kernels
from anycontrast_kernels.bench.__main__ import main
from anycontrast_kernels.bench.attention_ways import Case, attention_ways
from anycontrast_kernels.bench.kernels import KernelsBenchConfig
from anycontrast_kernels.bench.memory_ways import memory_cases
from anycontrast_kernels.bench.mixed import mixed_lengths
from anycontrast_kernels.bench.settings import read_settings

CPU = torch.device("cpu")
SMALL = [
    "head_dims=[64]",
    "lengths=16,32",
    "num_tokens=64",
    "width=64",
    "num_patches=4",
    "budget_s=0.001",
    "device=cpu",
]
KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    return kernels.run(read_settings(KernelsBenchConfig, [*SMALL, f"folder={folder}"]))


def test_every_way_is_measured_in_both_directions(result: dict[str, Any]) -> None:
    measured = {(row["lengths"], row["way"]) for row in result["attention"]}
    assert measured == {
        (length, way)
        for length, other in (("16", "dense"), ("32", "dense"), ("mixed", "padded"))
        for way in ("loop", "block mask", other)
    }
    for row in result["attention"]:
        for direction in ("forward", "backward"):
            assert row[f"{direction}_tflop_s"] > 0
            assert row[f"{direction}_share"] == pytest.approx(
                row[f"{direction}_tflop_s"] / result["ceiling"]["tflop_s"]
            )
    assert {row["operation"] for row in result["memory"]} == {
        "loss",
        "loss and gradient",
        "patches",
    }
    assert not [row for row in result["memory"] if "failed" in row]


def test_what_cannot_run_is_named_with_its_reason(result: dict[str, Any]) -> None:
    assert set(result["left_out"]) == {"fa4", "fa3", "torch", "fa2", "triton", "flex"}
    assert result["left_out"]["torch"] == "needs a CUDA device, this is cpu"


def test_table_and_plots_are_saved(result: dict[str, Any]) -> None:
    files = {Path(name).name: Path(name) for name in result["files"]}
    assert set(files) == {
        "kernels.json",
        "kernels.md",
        "kernels-forward-64.svg",
        "kernels-backward-64.svg",
    }
    saved = json.loads(files["kernels.json"].read_text())
    assert saved["attention"] == result["attention"]
    page = files["kernels.md"].read_text()
    assert f"torch {torch.__version__}" in page
    assert saved["environment"]["date"] in page
    assert "| loop |" in page
    assert "- fa4, fa3, torch, fa2, triton, flex: needs a CUDA device" in page
    picture = ET.fromstring(files["kernels-forward-64.svg"].read_text())
    points = picture.findall("{http://www.w3.org/2000/svg}circle")
    assert len(points) == len(result["attention"])


@pytest.mark.parametrize("lengths", [(8, 8, 8), (3, 9, 1, 5)])
def test_all_ways_compute_the_same(lengths: tuple[int, ...]) -> None:
    case = Case("x", 32, 2, lengths, torch.float32, CPU)
    q, k, v, _ = case.inputs()
    ways, _ = attention_ways(case, ())
    assert len(ways) == 3
    found = [way(q, k, v) for way in ways.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_ours_and_plain_do_the_same_work() -> None:
    cases = {(c.name, c.way): c for c in memory_cases(CPU, torch.float32, 4)}
    for name in ("loss", "patches"):
        ours, plain = (cases[name, way].call() for way in ("ours", "plain PyTorch"))
        torch.testing.assert_close(ours, plain)


def test_the_mixed_pack_fills_the_budget_with_many_lengths() -> None:
    lengths = mixed_lengths(32768)
    assert sum(lengths) == 32768
    assert 8 <= len(lengths) <= 32
    assert max(lengths) > 4 * min(lengths)
    assert lengths == mixed_lengths(32768)


def test_goals_are_held_against_our_kernels() -> None:
    rows = [
        {"head_dim": 64, "lengths": n, "way": "triton", "forward_tflop_s": f, "backward_tflop_s": b}
        for n, f, b in (("512", 100.0, 90.0), ("4096", 400.0, 280.0), ("mixed", 370.0, 200.0))
    ]
    memory = [{"operation": "loss", "way": "ours", "share": 0.81}]
    met = {name: bar["met"] for name, bar in kernels._bars(rows, memory).items()}
    assert met == {
        "triton_forward_64": True,
        "triton_backward_64": False,
        "triton_varlen_forward_64": True,
        "triton_varlen_backward_64": False,
        "copy_share_loss": True,
    }


def test_settings_are_read_by_type() -> None:
    words = ["head_dims=[64]", "budget_s=0.5", "folder=x", "ways=loop,dense"]
    found = read_settings(KernelsBenchConfig, words)
    assert (found.head_dims, found.budget_s, found.folder) == ((64,), 0.5, "x")
    assert found.ways == ("loop", "dense")


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("speed=9", "a key of folder, device"),
        ("folder", "expected key=value"),
        ("num_tokens=many", "num_tokens: must be int"),
        ("dtype=int8", "dtype: must be bfloat16"),
        ("device=tpu", "device: must be cpu or cuda"),
        ("head_dims=[20]", "head_dims: must be multiples of 8"),
        ("budget_s=0", "budget_s > 0"),
    ],
)
def test_bad_settings_are_refused(
    word: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", word]) == 2
    assert match in capsys.readouterr().err


def test_another_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream"]) == 2
    assert "usage: " in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_with_nothing_but_torch_triton_and_numpy(tmp_path: Path) -> None:
    """In a fresh process from another folder; what else it imports would be missing there."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['bench', 'kernels', 'json=true', 'folder={tmp_path}', *{SMALL!r}]\n"
        "try:\n"
        "    runpy.run_module('anycontrast_kernels.bench', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(tops & {'anycontrast', 'anycontrast_datasets', 'omegaconf', 'matplotlib',\n"
        "    'nibabel', 'ray', 'deepspeed', 'pyarrow', 'numcodecs', 'monai'}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    line = done.stdout.splitlines()[-1]
    assert json.loads(line)["environment"]["dtype"] == "float32"
    assert done.stdout.count("\n") == 1
