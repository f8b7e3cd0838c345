"""The cpu image, built once a session by docker/build.sh, and what its tests run in it with."""

import dataclasses
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pytest

from tests import pins
from tests.clusters.site import SMALL
from tests.image import builder
from tests.train import factory

USER = 10001
# What runs the tests inside: the image has none of it.
TEST_PACKAGES = ("pytest", "pytest-timeout", "pluggy", "iniconfig", "hypothesis", "sortedcontainers", "beartype")
TINY = {**SMALL, "value.save_interval": "1", "value.val_interval": "1000", "value.log_interval": "1"}


@dataclasses.dataclass
class Layer:
    """One layer of the saved image: its uncompressed bytes, and each member's header."""

    size: int
    members: list[tarfile.TarInfo]


@dataclasses.dataclass
class Image:
    id: str

    def inspect(self) -> dict:
        """Configuration and layer ids."""
        return json.loads(builder.call("buildah", "inspect", "--type", "image", self.id).stdout)["OCIv1"]

    def run(self, *arguments: str, options: tuple[str, ...] = (), check: bool = True, timeout: int = 240):
        """`hvd ARGUMENTS` in it, restricted as a pod would be."""
        return builder.call(*builder.podman_run(self.id, *arguments, options=options), check=check, timeout=timeout)

    def python(self, *arguments: str, options: tuple[str, ...] = (), check: bool = True):
        """`python ARGUMENTS` in it."""
        return self.run(*arguments, options=("--entrypoint=/opt/venv/bin/python", *options), check=check)


@pytest.fixture(scope="session")
def image() -> Image:
    lacking = builder.missing()
    if lacking:
        pytest.skip(lacking)
    return Image(builder.build("cpu"))


@pytest.fixture(scope="session")
def archive(image) -> Iterator[Path]:
    """The image as a tar of its size; removed after the session."""
    path = Path(builder.settings()["TMPDIR"]) / f"hvd-cpu-{os.getpid()}.tar"
    builder.call(builder.ROOT / "docker" / "save.sh", image.id, path, "localhost/hvd:cpu")
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def layers(archive) -> list[Layer]:
    """From the base to the project."""
    with tarfile.open(archive) as outer:
        manifest = json.load(cast(IO[bytes], outer.extractfile("manifest.json")))
        found = []
        for name in manifest[0]["Layers"]:
            with tarfile.open(fileobj=outer.extractfile(name)) as inner:
                found.append(Layer(outer.getmember(name).size, inner.getmembers()))
    return found


@pytest.fixture(scope="session")
def test_packages(tmp_path_factory) -> Path:
    """pytest and its companions at the project's pins, for the image's Python."""
    folder = tmp_path_factory.mktemp("packages")
    pinned = [pin for pin in pins.from_pyproject(pins.PYPROJECT.read_text()) if pin.split("==")[0] in TEST_PACKAGES]
    assert len(pinned) == len(TEST_PACKAGES)
    flags = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.13"]
    command = [builder.uv(), "pip", "install", *flags, "--target", str(folder), *pinned]
    subprocess.run(command, check=True, cwd=folder)
    folder.chmod(0o755)  # else root's alone, and the image's user has to read it
    return folder


class Storage:
    """A volume of the image's user, with the data of a run; the working directory, as in a pod."""

    def __init__(self, folder: Path):
        self.folder = folder
        factory.write_dataset(folder / "data" / "optimal", episodes=2, length=12, seed=1)
        factory.write_dataset(folder / "data" / "suboptimal", episodes=3, length=12, seed=2)
        builder.call("chown", "-R", f"{USER}:{USER}", folder)
        self.options = (f"--volume={folder}:/storage", "--workdir=/storage", "--env=JAX_DISABLE_MOST_OPTIMIZATIONS=1")

    @property
    def value(self) -> Path:
        return self.folder / "runs" / "demo" / "value"

    def arguments(self, **changes: object) -> tuple[str, ...]:
        """Of a step. `value__num_train_steps=2` is `--value.num_train_steps 2`."""
        fields = {**TINY, **{name.replace("__", "."): str(value) for name, value in changes.items()}}
        data = [f"--{role}_data.root=data/{role}" for role in ("optimal", "suboptimal")]
        return ("--config", "demo", "--sim.task=", *data, *(f"--{name}={value}" for name, value in fields.items()))


@pytest.fixture
def storage(tmp_path) -> Storage:
    (tmp_path / "storage").mkdir()
    return Storage(tmp_path / "storage")
