#!/usr/bin/env bash
# Fetch promtool for the monitoring tests: infra/tools/get_promtool.sh [FOLDER]
#
# Takes Debian's `prometheus` package apart without installing it, so that no daemon starts, and
# prints the path of the binary. A promtool that is there already, in FOLDER or on the PATH, is used.
set -euo pipefail
folder=${1:-"$(cd "$(dirname "$0")/../.." && pwd)/.cache"}

if [ -x "$folder/promtool" ]; then
  echo "$folder/promtool"
  exit 0
fi
if command -v promtool >/dev/null; then
  command -v promtool
  exit 0
fi
for tool in apt-get dpkg; do
  if ! command -v "$tool" >/dev/null; then
    echo "get_promtool: no $tool here; put a promtool on the PATH" >&2
    exit 1
  fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# The index of packages may never have been fetched on a fresh machine.
apt-get download -q prometheus >log 2>&1 ||
  { apt-get update -q >>log 2>&1 && apt-get download -q prometheus >>log 2>&1; } ||
  { echo "get_promtool: apt-get download prometheus failed:" >&2; tail -3 log >&2; exit 1; }
dpkg -x prometheus_*.deb unpacked
cd - >/dev/null
mkdir -p "$folder"
# Renamed into place, so that of two tests that fetch at once neither runs half a binary.
cp "$work/unpacked/usr/bin/promtool" "$folder/promtool.$$"
mv "$folder/promtool.$$" "$folder/promtool"
echo "$folder/promtool"
