"""Asks a server what a record of hvd.client holds, and compares the answers. Imports no jax."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvd.client import connect
from hvd.errors import UserError
from hvd.serve import exchanges, msgpack
from hvd.tables import aligned


def show(path: str, first: int) -> None:
    """Print one row an exchange: when, how long, what was asked, how many actions came."""
    rows = [["second", "took (ms)", "request", "actions"]]
    for _, exchange in zip(range(first), exchanges.read(path)[1], strict=False):
        request, reply = (_unpacked(x, path) for x in (exchange.request, exchange.reply))
        asked = " ".join(
            sorted(repr(name)[1:-1][:40] for name in request)
        )  # whoever wrote the record, no control characters
        rows.append([f"{exchange.at:.2f}", f"{exchange.took * 1e3:.1f}", asked, str(_actions(reply).shape)])
    print("\n".join(aligned(rows)), flush=True)


def ask_again(path: str, url: str, first: int, paced: bool) -> tuple[float, int]:
    """Ask the server at `url` the first questions of the record, at its own times where `paced`; prints a table.

    Returns:
        The largest difference of an action, infinite where an answer has another shape; how many were refused.
    """
    about, found = exchanges.read(path)
    said = _unpacked(about, path)
    then, now, differences, refused = [], [], [], 0
    with connect(url, api_key=os.environ.get("HVD_API_KEY", "")) as server:
        for name in ("config", "robot"):
            if name in said and said[name] != server.about.get(name):
                print(
                    f"note: the record is of {name} {said[name]!r:.80}, the server has {server.about.get(name)!r:.80}"
                )
        began = time.monotonic()
        for _, exchange in zip(range(first), found, strict=False):
            request, reply = (dict(_unpacked(x, path)) for x in (exchange.request, exchange.reply))
            if "seed" in reply and "noise" not in request:
                request["seed"] = reply["seed"]
            if paced:
                time.sleep(max(0.0, exchange.at - (time.monotonic() - began)))
            asked = time.monotonic()
            try:
                ours = _actions(server.ask(request))
            except UserError as error:
                refused += 1
                print(f"{exchange.at:.2f} s: refused: {error}", flush=True)
                continue
            now.append(time.monotonic() - asked)
            then.append(exchange.took)
            differences.append(_difference(ours, _actions(reply)))
    if not now and not refused:
        raise UserError(f"{path}: no exchange in it")
    print("\n".join(_summary(then, now, differences)), flush=True)
    return max(differences, default=0.0), refused


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest one; infinite where an answer has another shape, or a number that is none."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours - theirs).max(initial=0.0))


def _summary(then: Sequence[float], now: Sequence[float], differences: Sequence[float]) -> list[str]:
    rows = [["", "n", "p50 (ms)", "p99 (ms)"]]
    for name, times in (("then", then), ("now", now)):
        shares = [f"{np.quantile(times, q) * 1e3:.1f}" if len(times) else "-" for q in (0.5, 0.99)]
        rows.append([name, str(len(times)), *shares])
    worst = max(differences, default=float("nan"))
    return [*aligned(rows), f"largest difference of an action: {worst:.3g}"]


def _unpacked(message: bytes, path: str) -> Mapping[str, Any]:
    try:
        found = msgpack.unpack(message)
    except msgpack.Malformed as error:
        raise UserError(f"{path}: a message in it cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a message in it is a {type(found).__name__}, not a map")
    return found


def _actions(reply: Mapping[str, Any]) -> np.ndarray:
    actions = reply.get("actions")
    if not isinstance(actions, np.ndarray) or actions.dtype.kind != "f":
        raise UserError("a reply without actions")
    return actions
