"""The verified resolution as exact pins in pyproject.toml, because no lock file is kept in git.

    uv lock --upgrade && python tests/pins.py --write    # take newer versions, run every test, commit pyproject.toml
    python tests/pins.py                                 # exit code 1 when pyproject.toml and uv.lock differ

With the pins in `[tool.uv] constraint-dependencies`, `uv sync` and `uv run` resolve to the same versions everywhere. To
upgrade, `--clear` removes the pins first (`uv lock --upgrade` keeps to constraints).
"""

import argparse
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
BEGIN, END = "constraint-dependencies = [ # pins", "] # end of pins"


def normal(name: str) -> str:
    """A package name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def from_lock(lock: dict) -> list[str]:
    """One `name==version` for every package of a uv.lock that comes from an index, with a marker where they differ."""
    found: dict[str, list[dict]] = {}
    for package in lock["package"]:
        if "registry" in package["source"]:
            found.setdefault(normal(package["name"]), []).append(package)
    pins = []
    for name, versions in sorted(found.items()):
        for package in versions:
            pin = f"{name}=={package['version']}"
            if len(versions) > 1:
                pin += "; " + " or ".join(f"({marker})" for marker in package["resolution-markers"])
            pins.append(pin)
    return pins


def from_pyproject(text: str) -> list[str]:
    return tomllib.loads(text)["tool"]["uv"].get("constraint-dependencies", [])


def with_pins(text: str, pins: list[str]) -> str:
    """The text of pyproject.toml with these pins, in place of those that it has."""
    block = "\n".join([BEGIN, *(f'    "{pin}",' for pin in pins), END])
    if BEGIN in text:
        head, rest = text.split(BEGIN, 1)
        return head + block + rest.split(END, 1)[1]
    return text.replace("[tool.uv]\n", f"[tool.uv]\n{block}\n", 1)


def differences(pins: list[str]) -> list[str]:
    """What is installed in this environment but not pinned, or pinned at another version; one line each."""
    pinned: dict[str, set[str]] = {}
    for pin in pins:
        name, _, version = pin.partition(";")[0].strip().partition("==")
        pinned.setdefault(name, set()).add(version)
    lines = []
    for distribution in metadata.distributions():
        name = normal(distribution.metadata["Name"])
        if name == "hvd":
            continue
        if name not in pinned:
            lines.append(f"{name} {distribution.version} is installed but not pinned")
        elif distribution.version.partition("+")[0] not in pinned[name]:
            lines.append(f"{name} {distribution.version} is installed, pinned is {' or '.join(sorted(pinned[name]))}")
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="write the versions of uv.lock into pyproject.toml")
    group.add_argument("--clear", action="store_true", help="remove the pins, so that `uv lock --upgrade` can move")
    args = parser.parse_args()
    text = PYPROJECT.read_text()
    if args.clear:
        PYPROJECT.write_text(with_pins(text, []))
        return 0
    pins = from_lock(tomllib.loads(PYPROJECT.with_name("uv.lock").read_text()))
    if args.write:
        PYPROJECT.write_text(with_pins(text, pins))
        print(f"{len(pins)} pins written to {PYPROJECT.name}")
        return 0
    changed = sorted(set(pins) ^ set(from_pyproject(text)))
    for pin in changed:
        print(f"differs: {pin}", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
