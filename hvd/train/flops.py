"""FLOPs of a program, counted in its jaxpr: matrix products and convolutions, two FLOPs a multiplication and addition.

Everything else a network does (norms, softmax, the optimiser) is left out, as is usual for an MFU. Recomputation must
not count either: count a program whose remat is "none".
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from hvd.configs import Experiment, StageConfig
from hvd.train import run_dir as runs
from hvd.train import stage_data, state
from hvd.train.mesh import Devices
from hvd.train.program import Program


def of_step(
    make_program: Callable[[Experiment, Devices, int], Program], cfg: Experiment, stage: runs.Stage, devices: Devices
) -> int:
    """FLOPs of one training step over all devices, forward and backward, without recomputation. Nothing is run."""
    own: StageConfig = dataclasses.replace(getattr(cfg, stage), remat="none", grad_accum_steps=1)
    model = dataclasses.replace(cfg.model, attention="xla")  # a fused kernel hides its products
    plain = dataclasses.replace(cfg, model=model, **{stage: own})
    program = make_program(plain, devices, model.action_dim)
    like = state.abstract(program.init, devices)
    return count(program.step, like, stage_data.abstract_batch(plain, stage, devices))


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of one call of `function` with arguments like `args` (arrays or their shapes), over all devices together.

    Raises:
        ValueError: a matrix product stands in a loop whose number of rounds is not known.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [of_jaxpr(jaxpr) for jaxpr in _inner(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "shard_map":  # inside are the shapes of one device
        return params["mesh"].size * sum(inner)
    if name == "while" and sum(inner):
        raise ValueError("a matrix product in a while loop: its FLOPs are not known")
    return sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # a closed one holds one
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    """Each output sums over the kernel and its input channels; zeros put between inputs (lhs_dilation) do not count."""
    kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
    numbers = equation.params["dimension_numbers"]
    window = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])  # input channels of a group, and space
    return 2 * math.prod(out) * window // math.prod(equation.params["lhs_dilation"])


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
