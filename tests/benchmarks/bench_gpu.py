"""pi0 at its real size on this machine's GPUs: training, sampling, checkpoints, data wait, forms of attention (B5).

    python -m tests.benchmarks.bench_gpu [--parts step,sample,attention,checkpoint,data] [--configs pi0_r1_lora,pi0_r1]
        [--batches 8,16,32] [--layers scan] [--sample-layers stacked,separate] [--sample-batches 1,8]
        [--flow-steps 10,4,1] [--chunking none,guided,given] [--trace FOLDER] [--g1 FOLDER]
    JAX_PLATFORMS=cpu python -m tests.benchmarks.bench_gpu --tiny          # the same code, a tiny model, no GPU
    JAX_PLATFORMS=cpu python -m tests.benchmarks.bench_gpu --small --parts sample  # bench_train_step's small shape

Goals, for one H100: 30 samples/s for the full model (openpi's own figure is 18.5), MFU 40 %, sample_actions under
60 ms, a checkpoint blocks under 2 s, nothing is compiled after step 1, data wait under 2 % with the G1 data.

"sample" is of each config without LoRA: "stacked" by Pi0.sample_actions on the layers as training keeps them,
"separate" by hvd.models.acting as `hvd serve` does; --configs pi0_r1,pi05_r1 takes pi0.5 too. --chunking: "guided" by
the actions that are under way (real-time chunking), "given" them as a policy trained with prefixes is.

Every case is measured in a process of its own, on random weights; a case that does not fit its GPUs says so and the
others go on. "blocks": how long the step loop waits for a checkpoint. Memory is the peak that JAX reports, beside what
the compiler says the step needs (`hvd plan` says the same). --trace keeps a profile of two steps of each case.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("step", "sample", "attention", "checkpoint", "data")
CONFIGS = ("pi0_r1_lora", "pi0_r1")
TINY_SIZES = {
    "model.siglip_variant": "tiny",
    "model.image_size": "56",
    "model.paligemma_variant": "tiny_trunk",
    "model.action_expert_variant": "tiny",
    "model.vocab_size": "257",
}


def config(name: str, case: dict) -> Any:
    """The config of that name at the case's batch and remat, over all GPUs, without weights to load."""
    from hvd import overrides

    fields = {
        "policy.batch_size": str(case["batch"]),
        "value.batch_size": str(case["batch"]),
        "policy.remat": case["remat"],
        "policy.weight_loader": "",
        "fsdp_devices": "0",
        **(TINY_SIZES if case["tiny"] else {}),
    }
    cfg = overrides.experiment(["--config", name, *(word for k, v in fields.items() for word in (f"--{k}", v))])
    return small(cfg) if case["small"] else cfg


def small(cfg: Any) -> Any:
    """cfg in bench_train_step's small shape, with the prompt's own length."""
    import dataclasses

    from hvd.models import gemma
    from tests.benchmarks.bench_train_step import SHAPE

    for name in ("trunk", "expert"):
        gemma.VARIANTS[f"small_{name}"] = gemma.Config(**{k: v for k, v in SHAPE[name].items() if k != "rank"})
    sizes = {"paligemma_variant": "small_trunk", "action_expert_variant": "small_expert", "siglip_variant": "Ti/14"}
    horizon = {"action_horizon": SHAPE["horizon"], "vocab_size": SHAPE["vocab_size"]}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **sizes, **horizon))


def random_batch(cfg: Any, devices: Any) -> Any:
    import jax
    import numpy as np

    from hvd.train import stage_data

    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.float32:
            return rng.normal(size=leaf.shape).astype(np.float32)
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        return rng.integers(0, 2 if leaf.ndim == 1 else 256, leaf.shape).astype(leaf.dtype)

    return devices.place_batch(jax.tree.map(values, stage_data.abstract_batch(cfg, "policy", devices)))


def peak_gib() -> float:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / (1 << 30)


# --- the cases, each in its own process


def step(case: dict) -> dict:
    """Steps of the trainer's own compiled program on one batch; with `saves` checkpoints, and a step beside each."""
    import jax

    from hvd import accelerators
    from hvd.method import policy
    from hvd.train import checkpoints, flops, loop, mesh, state

    if case["layers"] == "scan":
        from hvd.models import stack
        from tests.benchmarks import scan_stack

        stack.run = scan_stack.run
    mesh.initialize()
    devices = mesh.make_devices(jax.device_count())
    cfg = config(case["config"], case)
    program = policy.make_program(cfg, devices, cfg.model.action_dim)
    like = state.abstract(program.init, devices)
    now = jax.block_until_ready(state.create(program.init, 0, like))
    batch = random_batch(cfg, devices)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **details: compiled.append(event) if "backend_compile" in event else None
    )
    began = time.perf_counter()
    jitted = loop.jitted_step(program, cfg.policy, devices, like)
    run = jitted.lower(now, batch, devices.flag()).compile()
    compile_s = time.perf_counter() - began
    walls = []
    late = 0
    for i in range(case["steps"] + 2):
        began = time.perf_counter()
        now, out = run(now, batch, devices.flag())
        jax.block_until_ready((now, out))
        walls.append(time.perf_counter() - began)
        if i == 0:
            late = len(compiled)
    seconds = statistics.median(walls[2:])
    if case["trace"]:
        with jax.profiler.trace(case["trace"]):
            for _ in range(2):
                now, out = run(now, batch, devices.flag())
                jax.block_until_ready((now, out))
    memory = run.memory_analysis()
    found = {
        "ms": seconds * 1e3,
        "samples_per_s": case["batch"] / seconds,
        "compile_s": compile_s,
        "compiled_later": len(compiled) - late,
        "peak_gib": peak_gib(),
        "compiler_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / (1 << 30),
    }
    known = accelerators.of_kind(jax.devices()[0].device_kind)
    counted = flops.of_step(policy.make_program, cfg, "policy", devices)
    found["tflops_per_device"] = counted / seconds / devices.count / 1e12
    found["mfu"] = found["tflops_per_device"] * 1e12 / known.flops if known else None
    if case["saves"]:
        with tempfile.TemporaryDirectory() as folder:
            saves = checkpoints.Checkpoints(folder, program.graph, 0)
            for i in range(1, case["saves"] + 1):  # the first makes Orbax's threads
                began = time.perf_counter()
                saves.save(i, now, {})
                found["blocks_s"] = time.perf_counter() - began
                now, out = run(now, batch, devices.flag())
                jax.block_until_ready(out)
                saves.wait()
                found["checkpoint_s"] = time.perf_counter() - began
            saves.close()
    return found


def sample(case: dict) -> dict:
    """One request after another; "separate": weights and program are those of `hvd serve`."""
    import jax
    import jax.numpy as jnp

    from hvd.models import acting, precision
    from hvd.models.chunking import Committed, Given
    from hvd.models.pi0 import Pi0
    from hvd.models.separate import separate
    from hvd.train import mesh
    from hvd.train.state import Graph

    mesh.initialize()
    cfg = config(case["config"], case)
    devices = mesh.make_devices(1, jax.devices()[:1])
    graph = Graph(lambda rngs: Pi0(cfg.model, rngs), None, precision.inference(cfg.model.dtype))
    params = jax.block_until_ready(jax.jit(graph.init)(jax.random.key(0)))
    observation = random_batch(cfg, devices)["observation"]
    noise = jnp.ones((case["batch"], cfg.model.action_horizon, cfg.model.action_dim))
    count = case["flow_steps"]
    under_way = jnp.broadcast_to(jnp.arange(cfg.model.action_horizon) < 4, noise.shape[:2])
    committed = {
        "none": None,
        "guided": Committed(noise, under_way.astype(jnp.float32)),
        "given": Given(noise, under_way),
    }[case["chunking"]]
    if case["sample_layers"] == "separate":
        params = jax.block_until_ready(separate(cfg.model, params))
        act = jax.jit(
            lambda params, seen, noise: acting.sample_actions(cfg.model, params, seen, noise, count, committed)
        )
    else:
        act = jax.jit(lambda params, seen, noise: graph.module(params).sample_actions(seen, noise, count))
    began = time.perf_counter()
    act = act.lower(params, observation, noise).compile()
    compile_s = time.perf_counter() - began
    walls = []
    for _ in range(case["steps"] + 2):
        began = time.perf_counter()
        jax.block_until_ready(act(params, observation, noise))
        walls.append(time.perf_counter() - began)
    if case["trace"]:
        with jax.profiler.trace(case["trace"]):
            jax.block_until_ready(act(params, observation, noise))
    ordered = sorted(walls[2:])
    found = {"p50_ms": statistics.median(ordered) * 1e3, "max_ms": ordered[-1] * 1e3}
    return found | {"compile_s": compile_s, "peak_gib": peak_gib()}


def attention(case: dict) -> dict:
    """Forward and backward of one attention in each form, bfloat16, at the sizes of the model's parts."""
    import jax
    import jax.numpy as jnp

    from hvd.models import attention as forms

    rows, t, heads, keys, size, masked = case["shape"]
    names = ("q", "k", "v")
    shapes = {"q": (rows, t, heads, size), "k": (rows, t, keys, size), "v": (rows, t, keys, size)}
    q, k, v = (jax.random.normal(jax.random.key(i), shapes[n], jnp.bfloat16) for i, n in enumerate(names))
    mask = (jnp.ones((rows, t, t), bool),) if masked else ()
    plain, fused = (forms.attend, forms.attend_cudnn) if masked else (forms.attend_all, forms.attend_all_cudnn)
    found: dict[str, Any] = {}
    for name, form in (("xla", plain), ("cudnn", fused)):

        def total(q: Any, k: Any, v: Any, form: Any = form) -> Any:
            return jnp.sum(form(q, k, v, *mask).astype(jnp.float32))

        run = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        try:
            jax.block_until_ready(run(q, k, v))
        except Exception as error:  # a form that this GPU has not is a result
            found[f"{name}_ms"] = None
            found[f"{name}_error"] = str(error).splitlines()[0][:100]
            continue
        began = time.perf_counter()
        for _ in range(case["steps"]):
            done = run(q, k, v)
        jax.block_until_ready(done)
        found[f"{name}_ms"] = (time.perf_counter() - began) / case["steps"] * 1e3
    return found


def data(case: dict) -> dict:
    """A real run of the policy stage on the G1's recordings: what of a step is waiting for data, and its rate."""
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "data": case["g1"],
            "runs_dir": f"{folder}/runs",
            "assets_dir": f"{folder}/assets",
            "policy.weighting": "none",
            "policy.suboptimal_share": "0.0",
            "policy.batch_size": str(case["batch"]),
            "policy.remat": "full",
            "policy.num_train_steps": str(case["steps"]),
            "policy.log_interval": str(case["steps"] // 2),
            "policy.save_interval": str(case["steps"]),
            "policy.val_batches": "0",
            "fsdp_devices": "0",
        }
        if not case["tiny"]:
            sizes = {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}
            sizes |= {"siglip_variant": "So400m/14", "image_size": "224", "dtype": "bfloat16", "vocab_size": "257152"}
            fields |= {f"model.{name}": value for name, value in sizes.items()}
        flags = [word for name, value in fields.items() for word in (f"--{name}", value)]
        for name in ("norm-stats", "train-policy"):
            subprocess.run([sys.executable, "-m", "hvd.cli", name, "--config", "g1", *flags], check=True, stdout=2)
        (file,) = Path(folder).rglob("metrics.jsonl")
        last = [json.loads(line) for line in file.read_text().splitlines()][-1]
    wait = last["time/data_wait_s"] / last["time/step_s"]
    return {"samples_per_s": last["time/samples_per_s"], "wait_share": wait, "mfu": last.get("time/mfu")}


# --- all of them


def cases(parts: list[str], args: argparse.Namespace) -> list[tuple[str, dict]]:
    common = {"tiny": args.tiny, "small": args.small, "remat": args.remat, "layers": args.layers, "trace": args.trace}
    found: list[tuple[str, dict]] = []
    batches = [int(b) for b in args.batches.split(",")]
    if "step" in parts:
        found += [
            ("step", common | {"config": name, "batch": b, "steps": args.steps, "saves": 0})
            for name in args.configs.split(",")
            for b in batches
        ]
    if "sample" in parts:
        found += [
            (
                "sample",
                common
                | {"config": name, "batch": int(b), "steps": 5 * args.steps, "sample_layers": layers}
                | {"flow_steps": int(count), "chunking": chunking},
            )
            for name in args.configs.split(",")
            if "lora" not in name
            for b in args.sample_batches.split(",")
            for layers in args.sample_layers.split(",")
            for count in args.flow_steps.split(",")
            for chunking in args.chunking.split(",")
            if layers == "separate" or chunking == "none"
        ]
    if "attention" in parts:
        rows = 2 if args.tiny else 16
        shapes = {"language": (rows, 836, 8, 1, 256, True), "images": (3 * rows, 256, 16, 16, 72, False)}
        found += [("attention", {"shape": shape, "part": part, "steps": args.steps}) for part, shape in shapes.items()]
    if "checkpoint" in parts:  # of LoRA: a full state is 50 GB on the disk
        case = {"config": "pi0_r1_lora", "batch": batches[0], "steps": args.steps, "saves": 2}
        found.append(("checkpoint", common | case))
    if "data" in parts:
        if Path(args.g1).is_dir():
            found.append(("data", common | {"batch": 16, "steps": 10 * args.steps, "g1": str(Path(args.g1).resolve())}))
        else:
            print(f"data: not run, no folder {args.g1} (--g1)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--batches", default="8,16,32")
    parser.add_argument("--layers", default="stack", choices=("stack", "scan"), help="scan: lax.scan, jax.checkpoint")
    parser.add_argument("--sample-layers", default="stacked,separate", help="forms of the layers in the part sample")
    parser.add_argument("--sample-batches", default="1,8")
    parser.add_argument("--flow-steps", default="10", help="in the part sample")
    parser.add_argument("--chunking", default="none", help="in the part sample: none, guided, given")
    parser.add_argument("--trace", default="", help="a folder for profiles (TensorBoard, Perfetto)")
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--g1", default=os.environ.get("HVD_G1_DATA", "../shared/data/g1_bottle"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        part, case = args.one
        print(
            json.dumps(
                {"step": step, "sample": sample, "attention": attention, "checkpoint": step, "data": data}[part](
                    json.loads(case)
                )
            )
        )
        return
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"error: --parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    asked = "import jax; print(len(jax.devices()), jax.devices()[0].platform, jax.devices()[0].device_kind)"
    where = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    print(f"{datetime.date.today()}, {where[0]} x {' '.join(where[2:])}, remat {args.remat}", flush=True)
    if where[1] != "gpu" and not args.tiny and not args.small:
        sys.exit("error: no GPU here; --tiny runs the same code with a tiny model")
    for part, case in cases(parts, args):
        name = " ".join(str(case[key]) for key in ("config", "part", "sample_layers") if key in case)
        name += f" batch {case['batch']}" if "batch" in case else ""
        name += f" steps {case['flow_steps']} chunking {case['chunking']}" if part == "sample" else ""
        command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--one", part, json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "RESOURCE_EXHAUSTED" in line or "rror" in line]
            print(f"{part:11}{name:30} failed: {' | '.join(line[:300] for line in lines[-3:]) or '?'}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        shown = (f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
        print(f"{part:11}{name:30} {'  '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
