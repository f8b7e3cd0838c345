"""The image on a machine without a container engine's daemon or a registry: made, run and packed by Debian's packages.

    python -m tests.image.builder install              # buildah, podman, runc and others; tests never do that
    python -m tests.image.builder build [EXTRA]        # the base once, then docker/build.sh; seconds after a change
    python -m tests.image.builder save FILE [NAME]     # build, then a tar for `ctr images import`
    python -m tests.image.builder run [ARGUMENT ...]   # `hvd ARGUMENT ...` in the cpu image, read-only, no network
    eval "$(python -m tests.image.builder env)"        # then plain buildah, podman, docker/*.sh
    python -m tests.image.builder remove               # the store

Everything lies below $HVD_IMAGE_STORE (/tmp/hvd-image): the machine's own images are left alone. $BASE_IMAGE may name a
base in a registry; without it docker/base.sh makes one.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("buildah", "podman", "runc", "mmdebstrap", "squashfs-tools", "zstd")
PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap", "mksquashfs", "zstd")
BASE = "localhost/debian:trixie-slim"

STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{root}/store/graph"
runroot = "{root}/store/run"
"""
# Without systemd: no journal and no cgroups of its making. runc, because crun wants cgroups that some machines lack.
# The limits are podman's own wherever it may raise them.
CONTAINERS = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=10000:10000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
"""


def folder() -> Path:
    return Path(os.environ.get("HVD_IMAGE_STORE", "/tmp/hvd-image"))


def missing() -> str:
    """'' where the image can be built, else one line for a skip that says what this machine lacks."""
    if os.geteuid() != 0:
        return "no image builder here: it needs root"
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    if lacking:
        return f"no image builder here: {', '.join(lacking)} not found (python -m tests.image.builder install)"
    return ""


def install() -> None:
    """Debian's packages, where any is missing."""
    if all(shutil.which(name) for name in PROGRAMS):
        return
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=env, check=True)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


def uv() -> str:
    """The program that `uv run` has started us with, or the one of the PATH."""
    return os.environ.get("UV") or shutil.which("uv") or "uv"


def settings() -> dict[str, str]:
    """Environment variables that make buildah, podman and docker/*.sh use a store of their own; writes their files."""
    root = folder()
    (root / "tmp").mkdir(parents=True, exist_ok=True)
    (root / "storage.conf").write_text(STORAGE.format(root=root))
    (root / "containers.conf").write_text(CONTAINERS)
    return {
        "CONTAINERS_STORAGE_CONF": str(root / "storage.conf"),
        "CONTAINERS_CONF": str(root / "containers.conf"),
        "BUILDAH_ISOLATION": "chroot",
        "TMPDIR": str(root / "tmp"),
        "ENGINE": "buildah",
        "BASE_IMAGE": os.environ.get("BASE_IMAGE", BASE),
    }


def environment() -> dict[str, str]:
    return {**os.environ, **settings()}


def call(*argv: str | Path, check: bool = True, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess[str]:
    """A command with those settings; its output is kept, and part of the AssertionError where it fails."""
    done = subprocess.run(
        [str(part) for part in argv],
        cwd=cwd,
        **{"env": environment(), "capture_output": True, "text": True, "timeout": 900, **options},
    )
    assert not check or done.returncode == 0, f"{shlex.join(map(str, argv))}\n{done.stdout or ''}{done.stderr or ''}"
    return done


def make_base(**options) -> None:
    """The stand-in for Debian's image, unless it is there or $BASE_IMAGE names another."""
    ours = settings()["BASE_IMAGE"] == BASE
    if ours and call("buildah", "inspect", "--type", "image", BASE, check=False).returncode:
        call(ROOT / "docker" / "base.sh", folder() / "base.tar", **options)


def remove() -> None:
    """The store and everything in it."""
    call("buildah", "rm", "--all", check=False)
    call("buildah", "rmi", "--all", "--force", check=False)
    for mount in (folder() / "store" / "graph" / "overlay", folder() / "store" / "graph"):
        call("umount", mount, check=False)  # each is mounted upon itself
    shutil.rmtree(folder(), ignore_errors=True)


def build(extra: str = "cpu", tag: str | None = None, *, source: Path = ROOT, **options) -> str:
    """Build from `source` and give the image's id, which stays when somebody else builds the same tag."""
    tag = tag or f"localhost/hvd:{extra}"
    identity = Path(settings()["TMPDIR"]) / f"{os.getpid()}.id"
    make_base(**options)
    flags = {**environment(), "BUILD_FLAGS": f"--iidfile {identity}"}
    call(source / "docker" / "build.sh", extra, tag, cwd=source, timeout=1800, env=flags, **options)
    text = identity.read_text().strip()
    identity.unlink()
    return text.removeprefix("sha256:")


def podman_run(tag: str, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command that runs `hvd ARGUMENTS` as a restricted pod would: no root, no capabilities, nothing writable."""
    restricted = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
    command = ["podman", "run", "--rm", "--network=none", *restricted, "--tmpfs=/tmp:rw,mode=1777", *options]
    return [*command, tag, *arguments]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["install", "build", "save", "run", "env", "remove"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.action == "install":
        install()
        return 0
    if lacking := missing():
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    shown = {"capture_output": False}
    match args.action:
        case "build":
            build(*args.arguments, **shown)
        case "save":
            file, name = [*args.arguments, "localhost/hvd:cpu"][:2]
            call(ROOT / "docker" / "save.sh", build(**shown), Path(file).absolute(), name, **shown)
        case "run":
            return call(
                *podman_run("localhost/hvd:cpu", *args.arguments), check=False, timeout=None, **shown
            ).returncode
        case "env":
            print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings().items()))
        case "remove":
            remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
