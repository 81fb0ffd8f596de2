"""How long a training step takes and what it holds: `anycontrast bench step preset=NAME`.

Every case is one forward and backward pass over a pack of studies of noise, in a fresh process, so
that its peak of memory is its own; large matrix products run beside it, round by round. AdamW's
step is timed by itself. `bmmae_reference` has the size of BM-MAE (Robinet et al., arXiv 2505.00568)
and is held against the project's bars; other names are the presets of `AMAEConfig`.

Runs without the rest of the platform too: `python -m anycontrast.bench.step preset=small`.
"""

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from anycontrast.bench.step_case import CONTRASTS, StepCase
from anycontrast.bench.timing import at_most, markdown_table
from anycontrast.models.amae import PRESETS
from anycontrast_kernels.bench.environment import environment
from anycontrast_kernels.bench.plot import bar_plot
from anycontrast_kernels.bench.settings import read_settings

logger = logging.getLogger(__name__)

REFERENCE = "bmmae_reference"
MODELS: dict[str, dict[str, Any]] = {
    # Encoder 768 x 12 with MLP 1536, decoder 384 x 3, patch 16. BM-MAE has a linear tokenizer for
    # every contrast, we have one and a modulation: its vector is made so long that the parameters
    # come to the same 76.5 million. In both, a token meets one projection only.
    REFERENCE: {"preset": "base", "mlp_ratio": 2.0, "contrast_vector_size": 5880},
    **{name: {"preset": name} for name in PRESETS},
}
BARS = {
    "joint": {"cpu_s": 6.0, "peak_gb": 2.0, "over_products": 1.25},
    "cross": {"cpu_s": 4.0},
}
"""Of `bmmae_reference` on CPU: two threads, float32, one study of 4 x 128^3."""
PEAK_TFLOP_S = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}
"""Dense bf16 by name of the GPU, as its maker states it; PCIe boards reach less."""


@dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    """What is measured, and where."""

    preset: str = REFERENCE
    """`bmmae_reference`, a preset of the model, or several with commas between."""
    decoder: Literal["both", "joint", "cross"] = "both"
    """`joint` predicts all hidden tokens, `cross` a quarter of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 on CUDA, fp32 on CPU."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Compile the blocks; `auto`: on CUDA."""
    recompute: Literal["none", "selective", "full"] = "none"
    """See `AMAEConfig.recompute`."""
    studies: int = 0
    """Studies of the pack; 0 means 1 on CPU, 16 on CUDA."""
    contrasts: int = 4
    side_vox: int = 128
    patch_vox: int = 16
    hidden_fraction: float = 0.75
    target_fraction: float = 0.25
    """Share of the hidden tokens that the cross decoder predicts."""
    threads: int = 2
    rounds: int = 5
    folder: str = "runs/bench"
    """Where step.json, step.md and step.svg are written."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in MODELS]
        if unknown:
            raise ValueError(f"preset must be of {', '.join(MODELS)}, got {unknown[0]!r}")
        for name in ("contrasts", "side_vox", "patch_vox", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.contrasts > len(CONTRASTS):
            raise ValueError(f"contrasts must be <= {len(CONTRASTS)}, got {self.contrasts}")
        if self.studies < 0 or self.side_vox % self.patch_vox:
            raise ValueError(
                "studies must be >= 0 and side_vox whole patches, got "
                f"{self.studies} and {self.side_vox} of {self.patch_vox}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: torch finds no GPU; use device=cpu")

    @property
    def names(self) -> list[str]:
        """The presets asked for."""
        return [name.strip() for name in self.preset.split(",")]


def run(config: StepBenchConfig) -> dict[str, Any]:
    """Measure and save; the first case's numbers stand at the top as `cpu_s`, `peak_gb` and so on.

    Raises:
        RuntimeError: the process of a case failed.
    """
    device, dtype = _place(config)
    decoders = ("joint", "cross") if config.decoder == "both" else (config.decoder,)
    cases = []
    for name in config.names:
        for decoder in decoders:
            logger.info("measuring a step of %s with the %s decoder", name, decoder)
            found = _in_new_process(_case(config, name, decoder, device))
            cases.append({"preset": name, "decoder": decoder, **found, **_rates(found, device)})
    result: dict[str, Any] = {
        "environment": {**environment(device, dtype), "threads": config.threads},
        **{key: cases[0][key] for key in ("cpu_s", "wall_s", "peak_gb", "over_products")},
        "cases": cases,
        "bars": _bars(cases, device),
    }
    result["markdown"] = {"step": step_table(cases, device)}
    result["files"] = _save(Path(config.folder), result)
    return result


def _place(config: StepBenchConfig) -> tuple[torch.device, torch.dtype]:
    is_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    is_half = config.precision == "bf16" or (config.precision == "auto" and is_gpu)
    return torch.device("cuda" if is_gpu else "cpu"), torch.bfloat16 if is_half else torch.float32


def _case(config: StepBenchConfig, name: str, decoder: str, device: torch.device) -> StepCase:
    is_gpu = device.type == "cuda"
    model = {
        **MODELS[name],
        "decoder": decoder,
        "recompute": config.recompute,
        "patch_vox": (config.patch_vox,) * 3,
    }
    return StepCase(
        model=model,
        num_studies=config.studies or (16 if is_gpu else 1),
        num_contrasts=config.contrasts,
        side_vox=config.side_vox,
        hidden_fraction=config.hidden_fraction,
        target_fraction=1.0 if decoder == "joint" else config.target_fraction,
        device=device.type,
        precision="bf16" if _place(config)[1] == torch.bfloat16 else "fp32",
        compile=config.compile == "true" or (config.compile == "auto" and is_gpu),
        threads=config.threads,
        rounds=config.rounds,
    )


def _in_new_process(case: StepCase) -> dict[str, Any]:
    """Run one case; where this process found its modules, the new one does."""
    done = subprocess.run(
        [sys.executable, "-m", "anycontrast.bench.step_case", json.dumps(asdict(case))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"measuring {case.model}: the process ended with code {done.returncode}: {last}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rates(found: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Rates by wall time, and the share of what the machine could do."""
    rates = {
        "tokens_per_s": found["tokens"] / found["wall_s"],
        "studies_per_s": found["num_studies"] / found["wall_s"],
    }
    if device.type == "cpu":
        return {**rates, "mfu": 1.0 / found["over_products"]}
    name = torch.cuda.get_device_name(device)
    peaks = [peak for part, peak in PEAK_TFLOP_S.items() if part in name]
    if not peaks:
        logger.warning("the peak of a %s is not known: no share of it is given", name)
        return rates
    return {**rates, "mfu": found["gflop"] / found["wall_s"] / 1e3 / peaks[0]}


def _bars(cases: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Bars of the reference model, which are stated for a CPU."""
    if device.type != "cpu":
        return {}
    return {
        f"{case['decoder']}_{name}": at_most(case[name], bar)
        for case in cases
        if case["preset"] == REFERENCE
        for name, bar in BARS[case["decoder"]].items()
    }


def step_table(cases: list[dict[str, Any]], device: torch.device) -> str:
    """Return the cases as a Markdown table."""
    share = "MFU, of products here" if device.type == "cpu" else "MFU, of the stated peak"
    header = [
        "model", "M parameters", "decoder", "GFLOP", "CPU s", "least", "wall s", "peak GB",
        "over products", share, "tokens/s", "studies/s", "AdamW s",
    ]  # fmt: skip
    rows = []
    for case in cases:
        adamw_s = case["adamw_cpu_s"] if device.type == "cpu" else case["adamw_wall_s"]
        rows.append(
            [case["preset"], f"{case['parameters_m']:.1f}", case["decoder"], f"{case['gflop']:.0f}"]
            + [f"{case[key]:.2f}" for key in ("cpu_s", "best_cpu_s", "wall_s", "peak_gb")]
            + [f"{case['over_products']:.2f}", f"{case['mfu']:.0%}" if "mfu" in case else "-"]
            + [f"{case['tokens_per_s']:.0f}", f"{case['studies_per_s']:.2f}", f"{adamw_s:.3f}"]
        )
    return markdown_table(header, rows)


def _save(folder: Path, result: dict[str, Any]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    place = result["environment"]
    title = "# One training step\n\nMade by `anycontrast bench step`.\n\n"
    title += f"{place['device']}, {place['dtype']}, {place['date']}, "
    title += ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    pages = {
        "step.json": json.dumps(result, indent=1) + "\n",
        "step.md": f"{title}\n\n{result['markdown']['step']}\n",
        "step.svg": _plot(result) + "\n",
    }
    for name, text in pages.items():
        (folder / name).write_text(text)
    return [str(folder / name) for name in pages]


def _plot(result: dict[str, Any]) -> str:
    """Tokens a second of every model, a bar for each decoder."""
    groups: dict[str, dict[str, float]] = {}
    for case in result["cases"]:
        groups.setdefault(case["preset"], {})[case["decoder"]] = case["tokens_per_s"]
    place = result["environment"]
    return bar_plot(f"Training step: tokens/s ({place['device']}, {place['dtype']})", groups)


def main(words: list[str]) -> int:
    """Measure what the `key=value` words say; the result goes to standard output."""
    settings = [word for word in words if not word.startswith("json=")]
    try:
        config = read_settings(StepBenchConfig, settings)
    except ValueError as error:
        sys.stderr.write(f"{error}\nusage: python -m anycontrast.bench.step [key=value ...]\n")
        return 2
    result = run(config)
    if "json=true" not in words:
        sys.stdout.write(result["markdown"]["step"] + "\n\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
