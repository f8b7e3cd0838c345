"""The image: seconds of a build from nothing, of one after a change and of one without, and the size of each layer.

    python -m tests.benchmarks.bench_image [--extra cpu] [--sizes]      as root, see tests/image/builder.py

The first needs the package indices and is as fast as these are. --sizes only tells of the image that is built already.
Compressed sizes are zstd's at level 3, which is what registries and containerd work with.
"""

import argparse
import json
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

from tests.image import builder

NAMES = ("base: Debian", "Python, tini, RDMA libraries", "lists of packages", "dependencies", "the project")


def seconds(source: Path, extra: str) -> float:
    begin = time.perf_counter()
    builder.build(extra, source=source)
    return time.perf_counter() - begin


def build_times(extra: str) -> list[tuple[str, float]]:
    """(row, seconds); in a store of its own, which is left for the sizes."""
    with tempfile.TemporaryDirectory(prefix="hvd-bench-image-") as folder:
        source = Path(folder) / "source"
        ignored = shutil.ignore_patterns(".venv*", "runs", ".git", "assets")
        shutil.copytree(builder.ROOT, source, ignore=ignored)
        begin = time.perf_counter()
        builder.make_base()
        rows = [("base, by mmdebstrap", time.perf_counter() - begin)]
        rows.append(("from nothing", seconds(source, extra)))
        rows.append(("nothing changed", seconds(source, extra)))
        with (source / "hvd" / "cli.py").open("a") as file:
            file.write("# changed\n")
        rows.append(("a source file changed", seconds(source, extra)))
    return rows


def layer_sizes(extra: str) -> list[tuple[int, int]]:
    """(bytes unpacked, bytes compressed) of each layer."""
    found = []
    with tempfile.TemporaryDirectory(dir=builder.settings()["TMPDIR"]) as folder:
        archive = Path(folder) / "image.tar"
        builder.call(builder.ROOT / "docker" / "save.sh", f"localhost/hvd:{extra}", archive)
        with tarfile.open(archive) as outer:
            manifest = outer.extractfile("manifest.json")
            assert manifest
            for name in json.load(manifest)[0]["Layers"]:
                pipe = 'tar -xOf "$0" "$1" | zstd -3 -q | wc -c'
                packed = builder.call("bash", "-c", pipe, archive, name).stdout
                found.append((outer.getmember(name).size, int(packed)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", default="cpu", choices=["cpu", "cuda12", "data"])
    parser.add_argument("--sizes", action="store_true")
    args = parser.parse_args()
    if lacking := builder.missing():
        raise SystemExit(f"error: {lacking}")
    if not args.sizes:
        os.environ["HVD_IMAGE_STORE"] = tempfile.mkdtemp(prefix="hvd-bench-store-")
        print("| build | s |\n|---|---|")
        for name, taken in build_times(args.extra):
            print(f"| {name} | {taken:.0f} |")
        print()
    sizes = layer_sizes(args.extra)
    print("| layer | MB unpacked | MB compressed |\n|---|---|---|")
    for name, (size, packed) in zip(NAMES, sizes, strict=True):
        print(f"| {name} | {size / 1e6:,.1f} | {packed / 1e6:,.1f} |")
    print(f"| {args.extra} in all | {sum(s for s, _ in sizes) / 1e6:,.0f} | {sum(p for _, p in sizes) / 1e6:,.0f} |")
    if not args.sizes:
        builder.remove()


if __name__ == "__main__":
    main()
