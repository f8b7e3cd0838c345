"""Our policy step against openpi's on the same machine: one small model, one fixed batch, each case in its own process.

    python -m tests.benchmarks.bench_train_step [--steps 5] [--cases full_bf16,pi05_lora_bf16] [--remat none]
        [--depth 8] [--layers scan]
    python -m tests.benchmarks.bench_train_step --cases sample_bf16,sample_pi05_bf16 --steps 20

openpi's side runs when OPENPI_DIR names a checkout of it whose python, OPENPI_PYTHON (default: this one), has what its
model and training need (jax 0.5.3, flax 0.10.2, ...; torch and lerobot may be missing). Without it only ours is
measured. Both do a whole step: augmentation, loss, gradient, AdamW after clipping, and the EMA where nothing is LoRA.
openpi computes every layer again in the backward pass, and so does pi0_r1 (remat full), the default here.
The cases `sample_...` ask for the actions of one observation after another, ten flow steps each. compile_s is then what
comes before the first request of `hvd serve`, and openpi's first request; first_s is the next one.

Shape: gemma width 512, depth 4, mlp 2048 beside an expert of width 256, mlp 1024; 8 heads, 1 key head, head size 64;
SigLIP Ti/14, three images of 224x224, 48 prompt tokens (pi0.5: 200), horizon 20, vocabulary 16,384; batch 4.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRUNK = {"width": 512, "depth": 4, "mlp_dim": 2048, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64}
EXPERT = TRUNK | {"width": 256, "mlp_dim": 1024}
SHAPE = {
    "trunk": TRUNK | {"rank": 16},
    "expert": EXPERT | {"rank": 32},
    "siglip": "Ti/14",
    "vocab_size": 16_384,
    "horizon": 20,
    "batch": 4,
}
DTYPES = (("bf16", "bfloat16"), ("f32", "float32"))
FAMILIES = (("", "pi0", 48), ("pi05_", "pi05", 200))
CASES = {
    f"{prefix}{kind}_{short}": {"part": "step", "family": family, "tokens": n, "lora": kind == "lora", "dtype": dtype}
    for prefix, family, n in FAMILIES
    for kind in ("full", "lora")
    for short, dtype in DTYPES
} | {
    f"sample_{prefix}{short}": {"part": "sample", "family": family, "tokens": n, "lora": False, "dtype": dtype}
    | {"batch": 1, "flow_steps": 10}
    for prefix, family, n in FAMILIES
    for short, dtype in DTYPES
}
STEPS = ("full_bf16", "full_f32", "lora_bf16", "lora_f32")


def timed(call: Callable[[], object], count: int) -> tuple[list[float], list[float]]:
    """Seconds and CPU-seconds of each of `count` calls."""
    walls, cpus = [], []
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return walls, cpus


def config_of(case: dict) -> Any:
    """pi0_r1 or pi05_r1 with the case's sizes."""
    from hvd.experiments import get_config
    from hvd.models import gemma
    from hvd.models.lora import LoraConfig

    suffix = "_lora" if case["lora"] else ""
    for name in ("trunk", "expert"):
        sizes = dict(case[name])
        rank = sizes.pop("rank")
        lora = LoraConfig(rank, float(rank)) if case["lora"] else None
        gemma.VARIANTS[f"bench_{name}{suffix}"] = gemma.Config(**sizes, lora=lora)
    cfg = get_config(f"{case['family']}_r1")
    model = dataclasses.replace(
        cfg.model,
        dtype=case["dtype"],
        vocab_size=case["vocab_size"],
        paligemma_variant=f"bench_trunk{suffix}",
        action_expert_variant=f"bench_expert{suffix}",
        siglip_variant=case["siglip"],
        action_horizon=case["horizon"],
        max_token_len=case["tokens"],
    )
    own = dataclasses.replace(
        cfg.policy, batch_size=case["batch"], ema_decay=0.0 if case["lora"] else 0.99, remat=case["remat"]
    )
    return dataclasses.replace(cfg, model=model, policy=own, fsdp_devices=1)


def random_observation(model: Any, rows: int, rng: Any) -> dict[str, Any]:
    import numpy as np

    return {
        "state": rng.normal(size=(rows, model.action_dim)).astype(np.float32),
        "images": {c: rng.integers(0, 256, (rows, 224, 224, 3)).astype(np.uint8) for c in model.cameras},
        "image_masks": {c: np.ones(rows, bool) for c in model.cameras},
        "tokenized_prompt": rng.integers(0, model.vocab_size, (rows, model.max_token_len)).astype(np.int32),
        "tokenized_prompt_mask": np.ones((rows, model.max_token_len), bool),
    }


def sample(case: dict) -> dict[str, float]:
    """Requests one after another, with the weights and the program of `hvd serve`."""
    began = time.perf_counter()
    import jax
    import numpy as np

    from hvd.models import acting, precision
    from hvd.models.pi0 import Pi0
    from hvd.models.separate import separate
    from hvd.train.state import Graph

    imported = time.perf_counter()
    model = config_of(case).model
    graph = Graph(lambda rngs: Pi0(model, rngs), None, precision.inference(model.dtype))
    params = separate(model, jax.block_until_ready(jax.jit(graph.init)(jax.random.key(0))))
    seen = random_observation(model, case["batch"], np.random.default_rng(0))
    noise = np.ones((case["batch"], model.action_horizon, model.action_dim), np.float32)
    made = time.perf_counter()
    act = jax.jit(lambda params, seen, noise: acting.sample_actions(model, params, seen, noise, case["flow_steps"]))
    np.asarray(act(params, seen, noise))
    ready = time.perf_counter()
    walls, cpus = timed(lambda: np.asarray(act(params, seen, noise)), case["steps"])
    return {
        "import_s": imported - began,
        "init_s": made - imported,
        "compile_s": ready - made,
        "first_s": walls[0],
        "wall_s": statistics.median(walls),
        "max_s": max(walls),
        "cpu_s": statistics.median(cpus),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def step(case: dict) -> dict[str, float]:
    """The train step of the policy stage."""
    began = time.perf_counter()
    import jax
    import numpy as np

    from hvd.method import policy
    from hvd.train import host_memory, mesh, state

    if case.get("layers") == "scan":
        from hvd.models import stack
        from tests.benchmarks import scan_stack

        stack.run = scan_stack.run
    imported = time.perf_counter()
    cfg = config_of(case)
    model = cfg.model
    devices = mesh.make_devices(1)
    program = policy.make_program(cfg, devices, 21)

    rng = np.random.default_rng(0)
    rows = case["batch"]
    batch = {
        "observation": random_observation(model, rows, rng),
        "actions": rng.normal(size=(rows, model.action_horizon, model.action_dim)).astype(np.float32),
        "action_mask": np.ones((rows, model.action_horizon), bool),
        "weights": np.ones((rows, len(cfg.levels())), np.float32),
        "source": np.arange(rows, dtype=np.int32) % 2,
        "index": np.arange(rows, dtype=np.int32),
    }
    batch = devices.place_batch(batch)
    like = state.abstract(program.init, devices)
    now = jax.block_until_ready(state.create(program.init, 0, like))
    made = time.perf_counter()
    step = jax.jit(program.step, donate_argnums=0, out_shardings=(state.shardings(like), devices.replicated))
    lowered = step.lower(now, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    host_memory.give_back()  # as hvd.train.loop does
    loss = 0.0

    def once() -> None:
        nonlocal now, loss
        now, metrics = compiled(now, batch)
        loss = float(metrics["loss"])

    walls, cpus = timed(once, case["steps"] + 1)
    return {
        "import_s": imported - began,
        "init_s": made - imported,
        "trace_s": traced - made,
        "compile_s": ready - traced,
        "wall_s": statistics.median(walls[1:]),
        "cpu_s": statistics.median(cpus[1:]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "temp_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "loss": loss,
    }


def in_process(command: list[str], case: dict) -> dict[str, float]:
    """The JSON of the last line that the command prints."""
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    done = subprocess.run(
        [*command, json.dumps(case)], capture_output=True, text=True, env=environment, cwd=os.getcwd()
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", default=",".join(STEPS), help=" ".join(CASES))
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--depth", type=int, default=TRUNK["depth"], help="from 7 on layers run in a loop")
    parser.add_argument(
        "--layers", default="stack", choices=("stack", "scan"), help="scan: lax.scan and jax.checkpoint"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case = json.loads(args.one)
        print(json.dumps({"step": step, "sample": sample}[case["part"]](case)))
        return
    openpi = os.environ.get("OPENPI_DIR")
    if not openpi:
        print("OPENPI_DIR is not set: only hvd is measured")
    columns = ("wall_s", "cpu_s", "peak_mb", "temp_mb", "compile_s", "trace_s", "init_s", "import_s", "loss")
    columns += ("first_s", "max_s")
    print(f"{'case':18}{'side':8}" + "".join(f"{column:>11}" for column in columns), flush=True)
    for name in args.cases.split(","):
        case = SHAPE | CASES[name] | {"steps": args.steps, "remat": args.remat, "layers": args.layers}
        case |= {part: SHAPE[part] | {"depth": args.depth} for part in ("trunk", "expert")}
        sides = {"hvd": [sys.executable, "-m", "tests.benchmarks.bench_train_step", "--one"]}
        if openpi:
            sides["openpi"] = [os.environ.get("OPENPI_PYTHON", sys.executable), str(HERE / "openpi_side.py")]
        found = {}
        for side, command in sides.items():
            found[side] = in_process(command, case)
            numbers = "".join(f"{found[side].get(column, float('nan')):11.3f}" for column in columns)
            print(f"{name:18}{side:8}{numbers}", flush=True)
        if openpi:
            speed = found["openpi"]["wall_s"] / found["hvd"]["wall_s"]
            memory = found["hvd"]["peak_mb"] / found["openpi"]["peak_mb"]
            print(f"{name:18}{speed:.2f} x the speed at {memory:.2f} x the peak memory", flush=True)


if __name__ == "__main__":
    main()
