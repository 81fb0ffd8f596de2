"""Guards the house: roots, import rules, light import, README map. Each guard is shown to bite."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "platform": "anycontrast",
    "kernels": "anycontrast_kernels",
    "datasets": "anycontrast_datasets",
}
OURS = tuple(PACKAGES.values())
MAY_IMPORT = {
    "anycontrast": {"anycontrast", "anycontrast_datasets", "anycontrast_kernels"},
    "anycontrast_datasets": {"anycontrast_datasets"},
    "anycontrast_kernels": {"anycontrast_kernels"},
}
# Library -> the only files (relative to the repository) that may import it.
ONLY_IN = {
    "ray": (
        "platform/anycontrast/training/cluster.py",
        "platform/anycontrast/training/ray_metrics.py",
        "platform/anycontrast/doctor",
        "datasets/anycontrast_datasets/shard",
    ),
    "deepspeed": ("platform/anycontrast/training/engine.py",),
    "webdataset": ("datasets/anycontrast_datasets/store/", "platform/anycontrast/bench/"),
    "zarr": ("datasets/anycontrast_datasets/store/", "platform/anycontrast/bench/"),
    "nibabel": ("datasets/anycontrast_datasets/volume.py", "platform/anycontrast/bench/"),
    "pydicom": ("datasets/anycontrast_datasets/sources/dicom",),
    "dcm2niix": ("datasets/anycontrast_datasets/sources/dicom",),
    "torchio": ("platform/anycontrast/bench/",),
    "triton": ("kernels/anycontrast_kernels/",),
    "flash_attn": ("kernels/anycontrast_kernels/",),
}
MODELS_MAY_NOT = ("omegaconf", "pathlib", "os", "fsspec", "ray", "deepspeed")
HEAVY = ("torch", "numpy", "ray", "deepspeed", "triton", "webdataset", "zarr", "monai", "nibabel")
MAX_LINES = 500
MAPPED = ("recipes", "infra", "docs")


def source_files(root: Path) -> list[Path]:
    return sorted(
        path
        for source_root, package in PACKAGES.items()
        for path in (root / source_root / package).rglob("*.py")
    )


def imported_modules(path: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
    return found


def root_violations(root: Path) -> list[str]:
    """Each source root holds exactly its one package, and is no package itself."""
    found = []
    for source_root, package in PACKAGES.items():
        names = {
            p.name
            for p in (root / source_root).iterdir()
            if p.name not in {"__pycache__", ".DS_Store"}
        }
        found += [
            f"{source_root}/{name} does not belong there" for name in sorted(names - {package})
        ]
    return found


def import_violations(root: Path) -> list[str]:
    """Who imports whom, by the rules of the house."""
    found = []
    for path in source_files(root):
        relative = path.relative_to(root).as_posix()
        package = next(name for name in OURS if f"/{name}/" in f"/{relative}")
        for line, module in imported_modules(path):
            top = module.split(".")[0]
            where = f"{relative}:{line} imports {module}"
            if top in OURS and top not in MAY_IMPORT[package]:
                found.append(f"{where}: {package} may not know {top}")
            if top in ONLY_IN and not relative.startswith(ONLY_IN[top]):
                found.append(f"{where}: only {', '.join(ONLY_IN[top])} may")
            if "/models/" in relative and top in MODELS_MAY_NOT:
                found.append(f"{where}: models know no machine, no files, no configuration")
    return found


def map_violations(root: Path) -> list[str]:
    """README's file map names every source file, recipe and document, and nothing that is gone."""
    chart = root / "infra" / "helm"
    text = (root / "README.md").read_text()
    section = text.partition("## File map")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    real = {
        p.relative_to(root).as_posix()
        for p in [*source_files(root), *(p for f in MAPPED for p in (root / f).rglob("*"))]
        if p.is_file() and p.name != "__init__.py" and "__pycache__" not in p.parts
        # The chart's own README explains its parts.
        if not (p.is_relative_to(chart) and p.name not in ("README.md", "values.yaml"))
        # Numbers and pictures of the tables that the map names.
        if not (p.is_relative_to(root / "docs" / "benchmarks") and p.suffix != ".md")
    }
    return [f"README's file map lacks {name}" for name in sorted(real - named)] + [
        f"README's file map names {name}, which does not exist" for name in sorted(named - real)
    ]


def light_import_violations(root: Path) -> list[str]:
    """`import anycontrast` in a fresh interpreter loads nothing heavy."""
    code = f"import sys, anycontrast; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={"PYTHONPATH": ":".join(str(root / r) for r in PACKAGES)},
    ).stdout
    return [f"import anycontrast loads {name}" for name in ast.literal_eval(out)]


def real_platform_violations(root: Path) -> list[str]:
    """A process started in the repository root gets the standard library's `platform`."""
    done = subprocess.run(
        [sys.executable, "-c", "import platform; platform.system()"],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={"PYTHONPATH": str(root)},
    )
    return (
        [] if done.returncode == 0 else [f"import platform is broken: {done.stderr.strip()[-200:]}"]
    )


CHECKS = [
    root_violations,
    import_violations,
    map_violations,
    light_import_violations,
    real_platform_violations,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: str(check.__name__))
def test_the_house_stands(check: object) -> None:
    assert callable(check)
    assert check(ROOT) == []


def test_source_files_stay_readable() -> None:
    lines = {
        p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in source_files(ROOT)
    }
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_recipes_stay_under_a_hundred_lines() -> None:
    lines = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "recipes").glob("*.py")}
    assert {name: n for name, n in lines.items() if n >= 100} == {}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in (*PACKAGES, *MAPPED):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_a_stray_init_in_a_source_root_is_caught(copy: Path) -> None:
    (copy / "platform" / "__init__.py").touch()
    assert any("platform/__init__.py" in v for v in root_violations(copy))
    assert real_platform_violations(copy)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/anycontrast_kernels/reference.py", "import anycontrast"),
        ("datasets/anycontrast_datasets/order.py", "from anycontrast_kernels import reference"),
        ("platform/anycontrast/models/amae.py", "import omegaconf"),
        ("platform/anycontrast/training/loop.py", "import deepspeed"),
        ("datasets/anycontrast_datasets/prepare.py", "import nibabel"),
        ("platform/anycontrast/cli.py", "import ray"),
    ],
)
def test_a_forbidden_import_is_caught(copy: Path, file: str, line: str) -> None:
    path = copy / file
    path.write_text(path.read_text() + f"\n{line}\n")
    assert any(v.startswith(file) for v in import_violations(copy))


def test_a_heavy_import_is_caught(copy: Path) -> None:
    path = copy / "platform" / "anycontrast" / "__init__.py"
    path.write_text(path.read_text() + "\nimport numpy\n")
    assert "import anycontrast loads numpy" in light_import_violations(copy)


def test_a_file_missing_from_the_map_is_caught(copy: Path) -> None:
    (copy / "kernels" / "anycontrast_kernels" / "novel.py").write_text('"""New."""\n')
    assert any("novel.py" in v for v in map_violations(copy))
