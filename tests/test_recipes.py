"""Recipes: thin, explained, and every configuration among them loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from anycontrast.training.config import load_config

RECIPES = Path(__file__).parents[1] / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.py"))
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


def test_there_is_something_to_check() -> None:
    assert {p.name for p in SCRIPTS} >= {"amae_pretrain.py", "amae_finetune.py", "demo.py"}
    assert "demo.yaml" in {p.name for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_fits_the_schema(path: Path) -> None:
    config = load_config(path)
    assert config.model.resolved().width
    assert path.read_text().startswith("#"), "a config opens with what it is for"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_can_be_finetuned(path: Path) -> None:
    config = load_config(path)
    window, patch = config.finetune.segmenter.window_vox, config.model.patch_vox
    assert not any(w % p for w, p in zip(window, patch, strict=True))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_recipes_stay_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100
    imported = {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    ours = {name for name in imported if name.startswith("anycontrast")}
    assert ours <= {"anycontrast.cli", "anycontrast.training.config"}


@pytest.mark.parametrize(
    ("name", "verb"), [("amae_pretrain.py", "pretrain"), ("amae_finetune.py", "finetune")]
)
def test_a_recipe_helps_and_refuses_like_its_verb(name: str, verb: str) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(RECIPES / name), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    helped = run("--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"usage: anycontrast {verb} ")
    assert f"{verb}.steps=" in helped.stdout
    refused = run(f"{verb}.stepz=3")
    assert refused.returncode == 2
    assert refused.stderr.count("anycontrast: error:") == 1
    assert f"did you mean '{verb}.steps'?" in refused.stderr
    assert "Traceback" not in refused.stderr
