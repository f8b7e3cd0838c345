"""Our policy step against openpi's on the same machine: one small pi0, one fixed batch, each case in its own process.

    python -m tests.benchmarks.bench_train_step [--steps 5] [--cases full_bf16,lora_bf16] [--remat none]
        [--depth 8] [--layers scan]

openpi's side runs when OPENPI_DIR names a checkout of it whose python, OPENPI_PYTHON (default: this one), has what its
model and training need (jax 0.5.3, flax 0.10.2, ...; torch and lerobot may be missing). Without it only ours is
measured. Both do a whole step: augmentation, loss, gradient, AdamW after clipping, and the EMA where nothing is LoRA.
openpi computes every layer again in the backward pass, and so does pi0_r1 (remat full), the default here.

Shape: gemma width 512, depth 4, mlp 2048 beside an expert of width 256, mlp 1024; 8 heads, 1 key head, head size 64;
SigLIP Ti/14, three images of 224x224, 48 prompt tokens, horizon 20, vocabulary 16,384; batch 4.
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRUNK = {"width": 512, "depth": 4, "mlp_dim": 2048, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64}
EXPERT = TRUNK | {"width": 256, "mlp_dim": 1024}
SHAPE = {
    "trunk": TRUNK | {"rank": 16},
    "expert": EXPERT | {"rank": 32},
    "siglip": "Ti/14",
    "vocab_size": 16_384,
    "horizon": 20,
    "tokens": 48,
    "batch": 4,
}
CASES = {
    f"{kind}_{short}": {"lora": kind == "lora", "dtype": dtype}
    for kind in ("full", "lora")
    for short, dtype in (("bf16", "bfloat16"), ("f32", "float32"))
}


def ours(case: dict) -> dict[str, float]:
    """One case of ours, measured in this process."""
    began = time.perf_counter()
    import jax
    import numpy as np

    from hvd.experiments import get_config
    from hvd.method import policy
    from hvd.models import gemma
    from hvd.models.lora import LoraConfig
    from hvd.train import host_memory, mesh, state

    if case.get("layers") == "scan":
        from hvd.models import stack
        from tests.benchmarks import scan_stack

        stack.run = scan_stack.run
    imported = time.perf_counter()
    suffix = "_lora" if case["lora"] else ""
    for name in ("trunk", "expert"):
        sizes = dict(case[name])
        rank = sizes.pop("rank")
        lora = LoraConfig(rank, float(rank)) if case["lora"] else None
        gemma.VARIANTS[f"bench_{name}{suffix}"] = gemma.Config(**sizes, lora=lora)
    cfg = get_config("pi0_r1")
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
    cfg = dataclasses.replace(cfg, model=model, policy=own, fsdp_devices=1)
    devices = mesh.make_devices(1)
    program = policy.make_program(cfg, devices, 21)

    rng = np.random.default_rng(0)
    rows = case["batch"]
    images = {c: rng.integers(0, 256, (rows, 224, 224, 3)).astype(np.uint8) for c in model.cameras}
    batch = {
        "observation": {
            "state": rng.normal(size=(rows, model.action_dim)).astype(np.float32),
            "images": images,
            "image_masks": {c: np.ones(rows, bool) for c in model.cameras},
            "tokenized_prompt": rng.integers(0, model.vocab_size, (rows, model.max_token_len)).astype(np.int32),
            "tokenized_prompt_mask": np.ones((rows, model.max_token_len), bool),
        },
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
    walls, cpus, loss = [], [], 0.0
    for _ in range(case["steps"] + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        now, metrics = compiled(now, batch)
        loss = float(metrics["loss"])
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
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
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--depth", type=int, default=TRUNK["depth"], help="from 7 on layers run in a loop")
    parser.add_argument(
        "--layers", default="stack", choices=("stack", "scan"), help="scan: lax.scan and jax.checkpoint"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(ours(json.loads(args.one))))
        return
    openpi = os.environ.get("OPENPI_DIR")
    if not openpi:
        print("OPENPI_DIR is not set: only hvd is measured")
    columns = ("wall_s", "cpu_s", "peak_mb", "temp_mb", "compile_s", "trace_s", "init_s", "import_s", "loss")
    print(f"{'case':12}{'side':8}" + "".join(f"{column:>11}" for column in columns), flush=True)
    for name in args.cases.split(","):
        case = SHAPE | CASES[name] | {"steps": args.steps, "remat": args.remat, "layers": args.layers}
        case |= {part: SHAPE[part] | {"depth": args.depth} for part in ("trunk", "expert")}
        sides = {"hvd": [sys.executable, "-m", "tests.benchmarks.bench_train_step", "--one"]}
        if openpi:
            sides["openpi"] = [os.environ.get("OPENPI_PYTHON", sys.executable), str(HERE / "openpi_train_step.py")]
        found = {}
        for side, command in sides.items():
            found[side] = in_process(command, case)
            numbers = "".join(f"{found[side].get(column, float('nan')):11.3f}" for column in columns)
            print(f"{name:12}{side:8}{numbers}", flush=True)
        if openpi:
            speed = found["openpi"]["wall_s"] / found["hvd"]["wall_s"]
            memory = found["hvd"]["peak_mb"] / found["openpi"]["peak_mb"]
            print(f"{name:12}{speed:.2f} x the speed at {memory:.2f} x the peak memory", flush=True)


if __name__ == "__main__":
    main()
