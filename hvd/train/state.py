"""What a training run carries from step to step, as plain nested dicts of arrays, and how it is made on the mesh.

Parameters are nested dicts with string keys, named as in the checkpoints ("PaliGemma/llm/layers/..."). A tree is split
in two: what is trained (has gradients, optimiser state and averages) and what is frozen (has none of them).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from hvd.configs import StageConfig
from hvd.models.precision import DtypeOf
from hvd.train import optimizer as optim
from hvd.train.mesh import Devices

type Tree = dict[str, Any]
type IsFrozen = Callable[[tuple[str | int, ...]], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree; the step function takes it and gives the next (its buffers are donated).

    Attributes:
        step: number of steps done, int32 scalar.
        trained, frozen: the parameters (disjoint; `join` gives the whole tree).
        opt_state: optax state of `trained`.
        ema: average of `trained` for inference, or {}.
        target: average of `trained` that the value stage's targets are computed with, or {}.
    """

    step: Any  # Any: the same class also holds shapes and shardings
    trained: Tree
    frozen: Tree
    opt_state: optax.OptState
    ema: Tree
    target: Tree


class Graph:
    """The static half of a model: knows each parameter's name, shape and dtype, and builds the module from arrays.

    Args:
        make: builds the nnx module from its random streams.
        is_frozen: on a parameter's path; default: nothing is frozen.
        dtype_of: how a parameter is kept (hvd.models.precision); default: as the module makes it.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        is_frozen: IsFrozen | None = None,
        dtype_of: DtypeOf | None = None,
    ):
        self._make = make
        self._graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        paths = dict(_leaves(nnx.to_pure_dict(state)))
        self._paths = {tuple(map(str, path)): path for path in paths}
        frozen = is_frozen or (lambda path: False)
        self._frozen = {name for name, path in self._paths.items() if frozen(path)}
        shapes = {tuple(map(str, path)): leaf for path, leaf in paths.items()}
        if dtype_of is not None:
            shapes = {
                name: jax.ShapeDtypeStruct(x.shape, dtype_of(name, name in self._frozen)) for name, x in shapes.items()
            }
        self.shapes: Tree = nest(shapes)

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(trained, frozen) parts of a whole tree."""
        flat = dict(_leaves(params))
        trained = nest({k: v for k, v in flat.items() if k not in self._frozen})
        return trained, nest({k: v for k, v in flat.items() if k in self._frozen})

    def module(self, *parts: Tree) -> Any:
        """The nnx module of a tree given as one or several disjoint parts. Cheap; meant to be called under jit."""
        flat = dict(_leaves(join(*parts)))
        return nnx.merge(self._graphdef, nest({self._paths[name]: leaf for name, leaf in flat.items()}))

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters; run it under jit with sharded outputs, so that none is whole on one device."""
        pure = nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key))))
        params = nest({tuple(map(str, path)): leaf for path, leaf in _leaves(pure)})
        return jax.tree.map(lambda x, like: x.astype(like.dtype), params, self.shapes)


def _leaves(tree: Mapping, prefix: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def nest(flat: Mapping[tuple, Any]) -> Tree:
    """Path tuple -> leaf, as nested dicts with sorted keys."""
    tree: Tree = {}
    for path in sorted(flat, key=lambda p: tuple(map(str, p))):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = flat[path]
    return tree


def join(*parts: Tree) -> Tree:
    """The union of disjoint trees."""
    return nest({path: leaf for part in parts for path, leaf in _leaves(part)})


def named(tree: Tree) -> dict[str, Any]:
    """ "a/b/c" -> leaf."""
    return {"/".join(path): leaf for path, leaf in _leaves(tree)}


def make_init(
    graph: Graph, optimizer: optax.GradientTransformation, *, ema: bool, target: bool
) -> Callable[[jax.Array], TrainState]:
    """key -> the state before the first step; the averages start as copies of the parameters."""

    def init(key: jax.Array) -> TrainState:
        trained, frozen = graph.split(graph.init(key))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trained=trained,
            frozen=frozen,
            opt_state=optimizer.init(trained),
            ema=jax.tree.map(jnp.copy, trained) if ema else {},
            target=jax.tree.map(jnp.copy, trained) if target else {},
        )

    return init


def abstract(init: Callable[[jax.Array], TrainState], devices: Devices) -> TrainState:
    """The state's shapes, dtypes and shardings; nothing is allocated."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.parameter(x.shape, x.dtype)), shapes
    )


def num_bytes(like: TrainState) -> dict[str, int]:
    """Size of the abstract state: {"state_bytes": of the whole, "state_bytes_per_device": of one device's part}."""
    whole = part = 0
    for x in jax.tree.leaves(like):
        whole += math.prod(x.shape) * x.dtype.itemsize
        part += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return {"state_bytes": whole, "state_bytes_per_device": part}


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def create(init: Callable[[jax.Array], TrainState], seed: int, like: TrainState) -> TrainState:
    """A fresh state, made in place on the mesh; the same numbers on every mesh."""
    # It runs once; on a CPU, optimising its many random kernels takes ten times as long as compiling them (19 s, 2 s)
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=shardings(like), compiler_options=options)(jax.random.key(seed))


def advance(
    state: TrainState,
    grads: Tree,
    optimizer: optax.GradientTransformation,
    cfg: StageConfig,
    *,
    target_share: float = 0.0,
) -> tuple[TrainState, Float[Array, ""]]:
    """The state after one update, and the gradients' norm before clipping.

    Compiled with a donated state this is one pass: XLA makes one kernel a leaf, which writes the parameter, both
    moments and the averages in place (H100: no temporary but the norm's): optax is as good as an update by hand.

    Args:
        grads: of the trained parameters.
        target_share: by how much the target network, if there is one, moves towards the new parameters.
    """
    trained, opt_state, norm = optim.update(optimizer, grads, state.opt_state, state.trained)
    ema = optim.moving_average(state.ema, trained, cfg.ema_decay) if state.ema else {}
    target = optim.moving_average(state.target, trained, 1.0 - target_share) if state.target else {}
    return TrainState(state.step + 1, trained, state.frozen, opt_state, ema, target), norm


def all_finite(tree: Any) -> Float[Array, ""]:
    """1.0 if every floating-point array of the tree is finite, else 0.0."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]).all().astype(jnp.float32)
