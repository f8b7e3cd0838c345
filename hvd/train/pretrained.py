"""`weight_loader`: a run starts from the parameters of an openpi checkpoint instead of random ones.

In three moments: `hvd.train.inputs.check_weights` asks cheaply whether there is one (before a job is queued); `ready`
fetches it and compares names and shapes (before the run's folder is touched); what `ready` gives puts the arrays in
their places once the fresh state is on the mesh. What the checkpoint lacks (LoRA updates, the value heads) stays as it
was initialised; what the model lacks is left over; both are printed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hvd.configs import Experiment
from hvd.models import weights
from hvd.runtime import preemption
from hvd.storage import cache as storage
from hvd.train import run_dir as runs
from hvd.train import state
from hvd.train.state import Graph, TrainState


def ready(
    cfg: Experiment, stage: runs.Stage, graph: Graph, *, overwrite: bool = False
) -> Callable[[TrainState], TrainState]:
    """What a fresh state of the stage goes through: its `weight_loader`'s parameters are put in.

    The checkpoint is opened, fetched first where it is a URL, and compared now, unless the run has a checkpoint of its
    own to go on from.

    Raises:
        UserError: no checkpoint there, or one of another model; a URL that cannot be fetched.
        Stopped: a signal came while it was fetched; what has come is kept.
    """
    path, field = getattr(cfg, stage).weight_loader, f"{stage}.weight_loader"
    if not path:
        return lambda fresh: fresh
    opened: list[weights.Checkpoint] = []

    def opened_once() -> weights.Checkpoint:
        if not opened:
            opened.append(open_checkpoint(path, field))
        return opened[0]

    if overwrite or not runs.has_checkpoint(getattr(cfg, f"{stage}_dir")):
        weights.match(opened_once(), state.named(graph.shapes))
    return lambda fresh: load(fresh, opened_once(), graph)


def open_checkpoint(path: str, field: str = "weight_loader") -> weights.Checkpoint:
    """The checkpoint at a local path, or at a URL, which is fetched into the cache of this node first."""

    def stop_if_asked() -> None:
        preemption.check(f"while {path} was fetched")

    local = storage.fetch(path, field, stop_if_asked) if storage.is_url(path) else path
    return weights.open_checkpoint(local, f"{field} {path}")


def load(fresh: TrainState, checkpoint: weights.Checkpoint, graph: Graph) -> TrainState:
    """The state with all parameters that the checkpoint has replaced; averages start from them. All processes together.

    The arrays of `fresh` that are replaced are freed first, so that no device holds both.

    Raises:
        UserError: no array of the checkpoint fits the model, or one has another shape (it is named).
    """
    model = state.named(state.join(fresh.trained, fresh.frozen))
    found = weights.match(checkpoint, model)
    wanted = {
        name: jax.ShapeDtypeStruct(model[name].shape, model[name].dtype, sharding=model[name].sharding)
        for name in found.loaded
    }
    if jax.process_index() == 0:
        print("\n".join(weights.report(checkpoint, found, model)), flush=True)
    for name in found.loaded:
        model[name].delete()
    for average in (fresh.ema, fresh.target):
        for x in jax.tree.leaves(average):
            x.delete()
    whole = model | weights.read(checkpoint, wanted)
    trained, frozen = graph.split(state.nest({tuple(name.split("/")): x for name, x in whole.items()}))
    return dataclasses.replace(
        fresh,
        trained=trained,
        frozen=frozen,
        ema=_started(fresh.ema, whole),
        target=_started(fresh.target, whole),
    )


def _started(average: state.Tree, whole: dict[str, jax.Array]) -> state.Tree:
    """An average (freed already) at its start: copies, of its own type, of the parameters that it averages."""
    return state.nest(
        {tuple(name.split("/")): jnp.array(whole[name], x.dtype, copy=True) for name, x in state.named(average).items()}
    )
