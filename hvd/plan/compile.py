"""One measurement of `hvd plan`, in a process of its own: the real step of a stage, lowered for devices that need not
be there, compiled, and asked for its memory. Nothing is allocated and no GPU is touched.

The request comes as JSON on stdin, the answer is the last line of stdout; what goes on is told on stderr.
"""

import dataclasses
import json
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hvd import overrides
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, EXIT_USER, UserError
from hvd.plan import buffers as plan_buffers
from hvd.plan import devices as plan_devices
from hvd.plan.request import Measurement, Request
from hvd.robots import get_robot

_DUMP = "--xla_dump_to={} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_packed"


def main() -> int:
    """Answer the request on stdin; the exit code is that of `hvd`."""
    request = Request(**json.load(sys.stdin))
    with tempfile.TemporaryDirectory(prefix="hvd-plan-") as folder:
        prepare_environment(request, folder)
        try:
            found = measure(request, Path(folder))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER
    print(json.dumps(dataclasses.asdict(found)), flush=True)
    return EXIT_COMPLETE


def prepare_environment(request: Request, dump: str) -> None:
    """Before the first import of jax: the CPU alone, as many of them as needed, and where XLA writes its buffers."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # a program from the cache has no dump
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    flags.append(_DUMP.format(dump))
    if request.compiler == "cpu":
        flags.append(f"--xla_force_host_platform_device_count={request.per_node * request.nodes}")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def measure(request: Request, dump: Path) -> Measurement:
    """Sizes of the step's arguments, and unless `request.limit` is too small for those already, the compiler's."""
    cfg = overrides.experiment(request.argv)
    if request.compiler == "cpu" and cfg.model.attention == "auto":  # which takes less memory there than on a GPU
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention="xla"))
    devices = make_devices(request, cfg)
    began = time.perf_counter()
    from hvd.method import policy, value
    from hvd.train import flops, loop, stage_data, state

    make_program = {"value": value, "policy": policy}[request.stage].make_program
    program = make_program(cfg, devices, _state_dims(cfg))
    like = state.abstract(program.init, devices)
    batch = stage_data.abstract_batch(cfg, request.stage, devices)
    sizes = {
        "parameters, trained": bytes_per_device(like.trained),
        "parameters, frozen": bytes_per_device(like.frozen),
        "optimiser": bytes_per_device(like.opt_state) + bytes_per_device(like.step),
        "EMA": bytes_per_device(like.ema),
        "target": bytes_per_device(like.target),
    }
    found = Measurement(
        compiler=request.compiler,
        state=sizes,
        batch=bytes_per_device(batch),
        gradients=bytes_per_device(like.trained),
        state_total=state.num_bytes(like)["state_bytes"],
        parameters=sum(math.prod(x.shape) for x in _leaves((like.trained, like.frozen))),
        trained=sum(math.prod(x.shape) for x in _leaves(like.trained)),
    )
    if not request.needs_compiler(found.least):
        return found

    step = loop.jitted_step(program, getattr(cfg, request.stage), devices, like)
    lowered = step.lower(like, batch, _flags(devices))
    print(f"lowered after {time.perf_counter() - began:.0f} s, compiling", file=sys.stderr, flush=True)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    parts = [plan_buffers.shape(_xla_name(x.dtype), _part(x)) for x in _leaves(like.trained)]
    others = [plan_buffers.shape(_xla_name(x.dtype), _part(x)) for x in _leaves(like.frozen)]
    split = plan_buffers.split(dump, compiled.as_text(), memory.temp_size_in_bytes, parts, others)
    return dataclasses.replace(
        found,
        peak=peak,
        argument=memory.argument_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        split=split.sizes if split else None,
        largest=split.largest if split else [],
        flops=flops.of_step(make_program, cfg, request.stage, devices),
        seconds=round(time.perf_counter() - began, 1),
        rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def make_devices(request: Request, cfg: Experiment) -> Any:
    """The run's mesh (hvd.train.mesh.Devices), over devices that are described only, or over those of the CPU."""
    import jax

    from hvd.train import mesh

    if request.compiler == "cuda":
        from jax.experimental import topologies

        cluster = plan_devices.parse(f"{request.per_node}x{request.device}", request.nodes)
        shape = f"1x{request.nodes}x{request.per_node}"
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=shape,
            topology=shape,
            target_config=plan_devices.target_config(cluster.accelerator, request.device),
        ).devices
    else:
        described = jax.devices()[: request.per_node * request.nodes]
    return mesh.make_devices(cfg.fsdp_devices or request.per_node, described)


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays with shardings."""
    return sum(math.prod(_part(x)) * x.dtype.itemsize for x in _leaves(tree))


def _part(x: Any) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape)


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def _flags(devices: Any) -> Any:
    import jax
    import numpy as np

    return jax.ShapeDtypeStruct((devices.count,), np.int32, sharding=devices.batch)


def _xla_name(dtype: Any) -> str:
    return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(str(dtype), str(dtype))


def _state_dims(cfg: Experiment) -> int:
    """Real dims of the state: no size depends on them."""
    return min(get_robot(cfg.robot).action_dim, cfg.model.action_dim)


if __name__ == "__main__":
    sys.exit(main())
