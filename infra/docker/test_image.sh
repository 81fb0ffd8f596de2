#!/usr/bin/env bash
# Build the CPU image and try it, without a Docker engine: infra/docker/test_image.sh [WORK_FOLDER]
#
# Needs buildah and debootstrap, and root (or user namespaces). The base is a bootstrapped Debian, kept
# in WORK_FOLDER for the next time. BUILDAH_ARGS and PIP_ARGS pass further words to the build.
# What it cannot show: the CUDA base, flash-attn, and a kubelet's probes.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${1:-.cache/image}
for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || { echo "test_image: $tool is not installed" >&2; exit 2; }
done
mkdir -p "$work"
work=$(cd "$work" && pwd)
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }
step() { printf '\n=== %s (%ss)\n' "$1" "$SECONDS"; }
fail() { echo "FAILED: $1" >&2; exit 1; }

step "base"
if [ ! -x "$work/base/usr/bin/python3" ]; then
  rm -rf "$work/base"
  debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$work/base" >"$work/base.log"
fi
if ! buildah images --format '{{.Name}}' | grep -q '^localhost/anycontrast-base$'; then
  container=$(buildah from scratch)
  buildah add -q "$container" "$work/base" / >/dev/null
  buildah commit -q "$container" localhost/anycontrast-base >/dev/null
  buildah rm "$container" >/dev/null
fi

step "build"
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' platform/anycontrast/__init__.py)
ray=$(sed -n 's/^ray==//p' constraints.txt)
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
# shellcheck disable=SC2086
buildah build --pull-never --network host ${BUILDAH_ARGS:-} -f infra/docker/Dockerfile \
  --ignorefile infra/docker/Dockerfile.dockerignore \
  --build-arg BASE_IMAGE=localhost/anycontrast-base --build-arg VARIANT=cpu \
  --build-arg PIP_ARGS="${PIP_ARGS:-}" --build-arg ANYCONTRAST_VERSION="$version" \
  --build-arg RAY_VERSION="$ray" --build-arg COMMIT="$commit" -t localhost/anycontrast:cpu .

step "labels, user, no health check"
facts=$(buildah inspect --type image localhost/anycontrast:cpu)
value() { python3 -c 'import json,sys; v=json.load(sys.stdin)["OCIv1"]["config"]
for key in sys.argv[1:]: v=v[key]
print(v)' "$@" <<<"$facts"; }
[ "$(value User)" = "1000:100" ] || fail "the user is $(value User)"
[ "$(value Labels anycontrast.ray)" = "$ray" ] || fail "label anycontrast.ray"
[ "$(value Labels org.opencontainers.image.revision)" = "$commit" ] || fail "label revision"
[ "$(value Labels org.opencontainers.image.version)" = "$version" ] || fail "label version"

container=$(buildah from --pull-never localhost/anycontrast:cpu)
trap 'buildah rm "$container" >/dev/null 2>&1 || true' EXIT
inside() { buildah run "$container" -- "$@"; }

step "runs as 1000:100, with what the probes call"
[ "$(inside id -u):$(inside id -g)" = "1000:100" ] || fail "runs as $(inside id)"
inside wget --version >/dev/null && inside bash --version >/dev/null || fail "wget or bash is missing"
inside bash -lc 'command -v ray && command -v anycontrast && ray --version' || fail "a login shell has no ray"

step "writes nothing outside of the listed folders"
writable=$(inside find / -xdev -type d -writable -not -path '/proc/*' -not -path '/sys/*' 2>/dev/null || true)
rest=$(grep -vE '^/(tmp|var/tmp|dev|run/lock|proc|sys)(/|$)' <<<"$writable" || true)
[ -z "$rest" ] || fail "uid 1000 may write to: $rest"

step "the package, the recipes and DeepSpeed's operations"
inside anycontrast --version
inside python recipes/amae_pretrain.py --help >/dev/null || fail "the recipe's help"
inside python -c 'from deepspeed.ops.adam import DeepSpeedCPUAdam; import torch
p = torch.nn.Parameter(torch.ones(8)); p.grad = torch.ones(8); DeepSpeedCPUAdam([p]).step()' \
  || fail "DeepSpeed's Adam is not built in"
inside python -c 'from anycontrast.training.provenance import provenance; print(provenance())' | tee "$work/said"
grep -q "commit $commit" "$work/said" || fail "the image does not say its commit"

step "a training of two steps"
inside python recipes/amae_pretrain.py root=/tmp/runs pretrain.steps=2 pretrain.optim.warmup_steps=1 \
  cluster.num_workers=1 cluster.mode=process scan.phantom.num_studies=8 pretrain.panel_every=-1 >/dev/null \
  || fail "the training"

step "done"
