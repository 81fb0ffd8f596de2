"""The image: what its Dockerfile says, and, where asked for, a real build of the CPU variant."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import anycontrast

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "infra" / "docker"
BUILD_FLAG = "ANYCONTRAST_IMAGE_TEST"


def instructions() -> list[tuple[str, str]]:
    """Instruction and its words, comments gone and continued lines joined."""
    lines = [
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parts = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in parts]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def defaults() -> dict[str, str]:
    return {
        name: value.strip('"')
        for name, _, value in (rest.partition("=") for rest in of("ARG"))
        if value
    }


def env() -> dict[str, str]:
    return dict(word.split("=", 1) for rest in of("ENV") for word in rest.split())


def test_it_runs_as_nobody_special_and_has_no_health_check() -> None:
    assert of("USER") == ["1000:100"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") > names.index("COPY")
    # Kubernetes ignores it, and OCI images cannot hold it.
    assert "HEALTHCHECK" not in names
    assert "ADD" not in names


def test_the_base_is_an_argument_with_a_public_default_of_a_fixed_version() -> None:
    base = defaults()["BASE_IMAGE"]
    assert of("FROM")[0].startswith("${BASE_IMAGE}")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d+\.\d+", base)
    assert defaults()["VARIANT"] == "cuda"


def test_labels_say_the_versions_that_the_build_checks() -> None:
    found = defaults()
    pins = (ROOT / "constraints.txt").read_text()
    assert f"ray=={found['RAY_VERSION']}\n" in pins
    assert found["ANYCONTRAST_VERSION"] == anycontrast.__version__
    (labels,) = of("LABEL")
    for text in ("anycontrast.ray=", "image.version=", "image.revision=", "anycontrast.writable="):
        assert text in labels
    assert any("check_build.py" in rest for rest in of("RUN"))


def test_operations_are_built_into_the_image_and_never_when_a_job_runs() -> None:
    runs = " ".join(of("RUN"))
    for text in ("DS_BUILD_CPU_ADAM=1", "DS_BUILD_FUSED_ADAM=1", "--no-binary deepspeed"):
        assert text in runs
    assert "flash-attn" in runs
    # A folder nobody may write: a build while a job runs fails and names it.
    folder = env()["TORCH_EXTENSIONS_DIR"]
    assert folder.startswith("/opt/anycontrast/")
    assert "chmod -R a+rX,go-w /opt/anycontrast" in runs


def test_all_that_is_written_lies_under_the_listed_folders() -> None:
    (labels,) = of("LABEL")
    listed = re.findall(r'anycontrast\.writable="([^"]*)"', labels)[0].split()
    assert listed == ["/tmp", "/dev/shm"]
    written = {k: v for k, v in env().items() if k.endswith(("CACHE_DIR", "CACHE_HOME", "HOME"))}
    written |= {"MPLCONFIGDIR": env()["MPLCONFIGDIR"]}
    assert len(written) == 5
    assert all(value == "/tmp" or value.startswith("/tmp/") for value in written.values())


def test_what_the_probes_and_login_shells_need_is_there() -> None:
    runs = " ".join(of("RUN"))
    for tool in ("bash", "wget", "gcc", "tini", "python3-dev"):
        assert re.search(rf"[ ]{tool}[ ]", runs), tool
    assert "/etc/profile.d/anycontrast.sh" in runs
    assert env()["PATH"].startswith("/opt/anycontrast/bin:")


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for rest in of("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    roots = {package.split("/")[0] for package in built["targets"]["wheel"]["packages"]}
    assert roots <= copied


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["cpu", f"anycontrast={anycontrast.__version__}"], "cpu_adam is not built in"),
        (["cuda", "ray=0.0.1"], "its label would say 0.0.1"),
    ],
)
@pytest.mark.slow
def test_the_check_of_a_build_names_what_is_not_as_labelled(words: list[str], problem: str) -> None:
    # This environment has DeepSpeed without built operations.
    done = subprocess.run(
        [sys.executable, str(DOCKER / "check_build.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert problem in done.stderr


def test_the_build_script_parses() -> None:
    subprocess.run(["bash", "-n", str(DOCKER / "test_image.sh")], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(BUILD_FLAG not in os.environ, reason=f"minutes; set {BUILD_FLAG}=1")
def test_the_cpu_image_is_built_and_trains() -> None:
    if shutil.which("buildah") is None or shutil.which("debootstrap") is None:
        pytest.skip("no buildah or debootstrap here")
    done = subprocess.run(
        [str(DOCKER / "test_image.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, json.dumps(done.stdout[-3000:]) + done.stderr[-3000:]
