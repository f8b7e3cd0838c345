"""Ways to damage a JoyLo recording, and what h5py finds in it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.fuzz import mutations

type Change = Callable[[h5py.File, str, np.ndarray, random.Random], Any]

RATES = (0, -1, float("nan"), float("inf"), 1e300, 1.5, "ten", b"x", [1, 2], [], 10**9, np.complex64(3), "10", True)


def spoil(path: Path, rng: random.Random) -> str:
    """Bytes damaged, or one dataset, link or attribute replaced."""
    if rng.random() < 0.45:
        path.write_bytes(mutations.damaged(rng, path.read_bytes()))
        return "bytes"
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        key = rng.choice(sorted(names))
        kind = rng.choice(sorted(KINDS))
        values = np.asarray(file[key])
        if kind == "rate":
            file.attrs["recording_freq"] = rng.choice(RATES)
        else:
            del file[key]
            KINDS[kind](file, key, values, rng)
    return f"{key}: {kind}"


def _set(
    change: Callable[[np.ndarray, random.Random], Any],
) -> Callable[[h5py.File, str, np.ndarray, random.Random], None]:
    def write(file: h5py.File, key: str, values: np.ndarray, rng: random.Random) -> None:
        file[key] = change(values, rng)

    return write


def _not_finite(values: np.ndarray, rng: random.Random) -> np.ndarray:
    found = values.astype(np.float64)
    found.flat[rng.randrange(found.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e39, 1e300))
    return found


def _huge(file: h5py.File, key: str, values: np.ndarray, rng: random.Random) -> None:
    shape = (rng.choice((10**9, 10**12, 2**40)), *values.shape[1:])
    file.create_dataset(key, shape=shape, dtype=values.dtype, chunks=(1, *values.shape[1:]))


def _wide(file: h5py.File, key: str, values: np.ndarray, rng: random.Random) -> None:
    wide = (4096, 4096, 3) if values.ndim == 4 else (10**7,)
    chunk = (1, *wide) if values.ndim == 4 else (1, 10**6)
    file.create_dataset(key, (len(values), *wide), dtype=values.dtype, chunks=chunk, compression="gzip")


def _external(file: h5py.File, key: str, values: np.ndarray, rng: random.Random) -> None:
    name = rng.choice(("/etc/passwd", "/proc/self/environ", "nothing", "/dev/zero", "../outside.h5"))
    file.create_dataset(key, shape=values.shape, dtype=values.dtype, external=[(name, 0, h5py.h5f.UNLIMITED)])


def _virtual(file: h5py.File, key: str, values: np.ndarray, rng: random.Random) -> None:
    layout = h5py.VirtualLayout(shape=values.shape, dtype=values.dtype)
    layout[...] = h5py.VirtualSource(rng.choice(("../outside.h5", ".", "nothing")), key, shape=values.shape)
    file.create_virtual_dataset(key, layout)


KINDS: dict[str, Change] = {
    "gone": lambda file, key, values, rng: None,
    "rate": lambda file, key, values, rng: None,
    "type": _set(lambda values, rng: values.astype(rng.choice(("f8", "i8", "u1", "f2", "i1", ">f4", "?", "c8")))),
    "shape": _set(
        lambda v, rng: rng.choice((v[None], v.reshape(-1), v[:-1], v[:0], np.concatenate([v, v]), v[..., None]))
    ),
    "not finite": _set(_not_finite),
    "denormal": _set(lambda values, rng: np.full(values.shape, 5e-324)),
    "large": _set(lambda values, rng: np.full(values.shape, 3e38, np.float32)),
    "huge": _huge,
    "wide": _wide,
    "link to itself": _set(lambda values, rng: h5py.SoftLink("/obs/x")),
    "soft link": _set(lambda values, rng: h5py.SoftLink("/action/torso")),
    "hard link to the root": lambda file, key, values, rng: file.__setitem__(key, file["/"]),
    "link out": _set(
        lambda values, rng: h5py.ExternalLink(rng.choice(("../outside.h5", "/dev/zero", "demo.hdf5")), "/")
    ),
    "external": _external,
    "virtual": _virtual,
    "no space": _set(lambda values, rng: h5py.Empty("f4")),
    "scalar": _set(lambda values, rng: 1.0),
    "group": lambda file, key, values, rng: file.__setitem__(f"{key}/x", 1.0),
    "words": _set(lambda values, rng: np.array([b"x"] * len(values))),
    "ragged": lambda file, key, values, rng: (
        file.create_dataset(key, (len(values),), dtype=h5py.vlen_dtype("f4")) and None
    ),
    "compound": _set(lambda values, rng: np.zeros(len(values), [("a", "f4"), ("b", "i4")])),
    "never written": lambda file, key, v, rng: file.create_dataset(key, v.shape, v.dtype),
}


def compare(config: Any, episode: Any) -> str:
    """What hvd reads of the episode that h5py does not; "" where nothing is."""
    with config.open(episode.ref) as found:
        state, actions, environment = found.state(), found.actions(), found.environment_state()
        pictures = {camera: np.concatenate(list(found.frames(camera))) for camera in config.cameras}
    episode.labels.rewards(episode.num_frames)
    with h5py.File(episode.ref.path) as file:
        for camera, got in pictures.items():
            if not np.array_equal(np.asarray(file[f"obs/rgb/{camera}/img"]), got):
                return f"other pictures of {camera}"
        from hvd.robots import ODOMETRY, get_robot

        columns: dict[str, list[np.ndarray]] = {"action": [], "state": []}
        for part in get_robot("r1").parts:
            width = len(part.names)
            key = f"{ODOMETRY}/base_velocity" if part.state == ODOMETRY else part.state
            if _find(file, key) is None:  # the raw twist is taken, which has tests of its own
                return ""
            for kind, name in (("action", part.action), ("state", key)):
                columns[kind].append(np.asarray(file[name]).reshape(episode.num_frames, -1)[:, :width])
        for kind, got in (("action", actions), ("state", state)):
            plain = np.concatenate([each.astype(np.float32) for each in columns[kind]], axis=1)
            if not np.array_equal(plain, got) or not np.isfinite(got).all():
                return f"another {kind}"
        if environment is not None and not np.isfinite(environment).all():
            return "an environment state that is not finite"
    return ""


def _find(file: h5py.File, key: str) -> Any:
    try:
        return file[key]
    except (KeyError, RuntimeError):
        return None


def deaths_are_lines(read: Callable[[Path], str]) -> Callable[[Path], str]:
    """`read` whose process of its own may die of the file: the conversion says so in a line and goes on."""
    from concurrent.futures.process import BrokenProcessPool

    from hvd.errors import UserError

    def lined(folder: Path) -> str:
        try:
            return read(folder)
        except BrokenProcessPool:
            raise UserError("the process that read it died") from None

    return lined
