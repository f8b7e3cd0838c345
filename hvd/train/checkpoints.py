"""Checkpoints of a run: asynchronous Orbax saves, restored onto whatever mesh the run has now.

<run>/checkpoints/<steps done>/
    params       {'params': tree}, openpi's form; the averaged parameters if there are any
    train_state  step, optimiser state, target; the raw parameters where `params` is an average
    loop         small JSON: what the step loop had not written out yet
    manifest.json  length and sha256 of every file (hvd.train.manifest); compared before a run goes on from it
    kept         an earlier keep_period kept it for ever: it stays under another one

A checkpoint that is not whole is never gone on from: it is renamed <steps done>.broken, and the newest whole one is
taken. On gs:// there is no manifest: the store has checksums of its own.
"""

import itertools
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from hvd import files
from hvd.errors import UserError
from hvd.train import host_memory, manifest
from hvd.train import run_dir as runs
from hvd.train.state import Graph, TrainState, join

_ITEMS = ("params", "train_state", "loop")
_NEEDED = ("params/_METADATA", "train_state/_METADATA", "loop/metadata")  # of a checkpoint without a manifest
_KEPT = "kept"


class _RaisedAnyway(logging.Filter):
    """Drops Orbax's own report of an error in a writing thread: the error is raised at the next call, and said once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_RaisedAnyway())


def _without_closed_loops(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An unraisablehook that drops what TensorStore says, array by array, after a save has failed and was raised."""

    def hook(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    return hook


sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


class Checkpoints:
    """Saving and restoring; every process of the run calls every method.

    Args:
        run_dir: the run's folder.
        graph: splits the parameters when restoring.
        keep_period: checkpoints at its multiples are kept; of all others only the newest. 0 = only the newest. What
            `keep_older` has marked stays in any case.
    """

    def __init__(self, run_dir: os.PathLike | str, graph: Graph, keep_period: int):
        self.folder = _folder(run_dir)
        self._graph, self._saving = graph, 0
        marked = [step for step in _steps(self.folder) if (self.folder / str(step) / _KEPT).exists()]
        keep: list[Any] = [policies.LatestN(1), policies.CustomSteps(marked)]
        if keep_period > 0:
            keep.append(policies.EveryNSteps(keep_period))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # by the process that makes a checkpoint whole, in the thread that does it, before it has its name
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=_ITEMS)

    def latest(self) -> int | None:
        """Step of the newest checkpoint that was saved to its end."""
        return self._manager.latest_step()

    def newest_whole(self) -> int:
        """Step of the newest checkpoint that is as it was saved; 0 where there is none at all. By one process.

        Newer ones that are damaged are named and renamed.

        Raises:
            UserError: there are checkpoints, and none is whole; nothing is renamed then.
        """
        broken: list[tuple[int, UserError]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = self._damage(step)
            if problem is None:
                break
            broken.append((step, problem))
        else:
            if broken:
                raise UserError(f"{broken[0][1]}; no other checkpoint is whole: bring one back, or --overwrite the run")
            return 0
        for other, problem in broken:
            path = self.folder / str(other)
            numbers = itertools.count(2)
            aside = self.folder / f"{other}.broken"
            while aside.exists():
                aside = self.folder / f"{other}.broken{next(numbers)}"
            path.rename(aside)
            print(
                f"warning: checkpoint {other}: {problem}; left aside as {aside.name}, going on from {step}", flush=True
            )
        return step

    def look_again(self) -> None:
        """Another process has renamed checkpoints; by every process."""
        self._manager.reload()

    def _damage(self, step: int) -> UserError | None:
        """What is wrong with a checkpoint on a local disk, by its manifest where it has one."""
        path = self.folder / str(step)
        if not files.is_local(path):
            return None
        try:
            saved = manifest.read(path)
            if saved is None:
                missing = [name for name in _NEEDED if not (path / name).exists()]
                return UserError(f"{path / missing[0]} is missing") if missing else None
            manifest.check_present(path, saved)
            manifest.check_digests(path, saved, manifest.NAME)
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{error.filename or path}: {error.strerror}")
        return None

    def _write_manifest(self) -> None:
        if not files.is_local(self.folder):
            return
        for path in self.folder.iterdir():
            if path.name.startswith(f"{self._saving}.orbax-checkpoint-tmp"):
                manifest.write(path)

    def save(self, step: int, state: TrainState, loop: dict[str, Any]) -> None:
        """Start a save and return when the arrays have been copied out; the writing goes on in the background.

        An error of the writing (a full disk) is raised here, or by the next `save` or `wait`.
        """
        items = _items(state)
        self.wait()  # two saves would hold two copies of the state
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(items["params"]),
                train_state=ocp.args.PyTreeSave(items["train_state"]),
                loop=ocp.args.JsonSave(loop),
            ),
            force=True,
        )

    def wait(self) -> None:
        """Until the newest save is whole on disk."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        host_memory.give_back()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, loop) of a step, placed as `like` (shapes with shardings of the current mesh) says.

        Raises:
            UserError: it is a checkpoint of another model, or, without a manifest, cannot be read.
        """
        items = _items(like)
        try:
            found = self._restored(step, items)
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            path = self.folder / str(step)
            if (path / manifest.NAME).exists():
                raise
            why = str(error).strip().partition("\n")[0][:200]
            raise UserError(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {why}): move it away, and the run goes on "
                "from the one before it; or --overwrite the run"
            ) from error
        trained, frozen = self._graph.split(found["params"]["params"])
        rest = found["train_state"]
        state = TrainState(
            step=rest["step"],
            trained=rest.get("trained", trained),
            frozen=frozen,
            opt_state=rest["opt_state"],
            ema=trained if like.ema else {},
            target=rest.get("target", {}),
        )
        return state, found["loop"]

    def _restored(self, step: int, items: dict[str, Any]) -> Any:
        for name, tree in items.items():
            _check_same(self.folder / str(step) / name, tree)
        return self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=_restore_args(items["params"]),
                train_state=_restore_args(items["train_state"]),
                loop=ocp.args.JsonRestore(),
            ),
        )

    def close(self) -> None:
        self._manager.close()


def keep_older(run_dir: os.PathLike | str, before: int, now: int) -> None:
    """Mark what keep_period `before` has kept for ever and `now` would delete: it stays until the user deletes it."""
    folder = _folder(run_dir)
    steps = [step for step in _steps(folder) if before and step % before == 0 and (not now or step % now)]
    for step in steps:
        (folder / str(step) / _KEPT).touch()
    if steps:
        print(
            f"keep_period was {before} and is {now}: the checkpoints {', '.join(map(str, steps))} in {folder} stay; "
            "delete them yourself if they are not needed",
            flush=True,
        )


def say_kept(stage: str, save_interval: int, keep_period: int) -> None:
    """Say so where a keep_period that is no multiple of the save_interval keeps less than it seems to."""
    if keep_period and keep_period % save_interval:
        print(
            f"{stage}.keep_period {keep_period} is no multiple of {stage}.save_interval {save_interval}: of the "
            f"checkpoints only those at multiples of {math.lcm(save_interval, keep_period)} are kept, and the last",
            flush=True,
        )


def _steps(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def restore_params(run_dir: os.PathLike | str, step: int, like: Any) -> Any:
    """The parameters for inference of one step of a run, placed as `like` says (its shapes have shardings)."""
    path = _folder(run_dir) / str(step) / "params"
    tree = {"params": like}
    _check_same(path, tree)
    return ocp.PyTreeCheckpointHandler().restore(path, args=_restore_args(tree))["params"]


def _folder(run_dir: os.PathLike | str) -> epath.Path:
    root = os.fspath(run_dir)
    # Orbax takes absolute paths only
    return epath.Path(os.path.abspath(root) if files.is_local(root) else root) / runs.CHECKPOINTS


def _items(state: TrainState) -> dict[str, Any]:
    """The trees as they lie in a checkpoint; nothing is stored twice."""
    rest: dict[str, Any] = {"step": state.step, "opt_state": state.opt_state}
    if state.ema:
        rest["trained"] = state.trained
    if state.target:
        rest["target"] = state.target
    return {"params": {"params": join(state.ema or state.trained, state.frozen)}, "train_state": rest}


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))


def _check_same(path: epath.Path, tree: Any) -> None:
    """UserError naming the first array that the checkpoint has and the model has not, or the other way round."""
    stored = _named_shapes(ocp.PyTreeCheckpointHandler().metadata(path).tree)
    wanted = _named_shapes(tree)
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored:
            problem = "is not in it"
        elif name not in wanted:
            problem = "is in it, but the model has no such parameter"
        elif stored[name] != wanted[name]:
            problem = f"has shape {list(stored[name])} in it, the model needs {list(wanted[name])}"
        else:
            continue
        raise UserError(f"{path} is a checkpoint of another model: {name} {problem}")


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        shape = getattr(leaf, "shape", None)
        if shape is not None:
            found["/".join(_key(part) for part in path)] = tuple(shape)
    return found


def _key(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
