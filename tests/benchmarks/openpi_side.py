"""openpi's own train step or sampling at the shape of bench_train_step, run by openpi's python: one line of JSON.

    PYTHONPATH=$OPENPI_DIR/src python openpi_side.py '{"part": "step", "lora": false, "dtype": "bfloat16", ...}'

Model, optimiser, augmentation and step are openpi's, from scripts/train.py; sampling is as in its policies/policy.py,
with the weights in bfloat16 as its policy_config.py loads them. Sizes are put in place of those that its
variants name. Packages of its data side (torch, lerobot, ...) that are not installed are replaced by empty modules:
nothing of them runs in a train step, and openpi's memory is the smaller for it.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import statistics
import sys
import time
import types

from bench_train_step import timed  # beside this script

began = time.perf_counter()
ABSENT_MAY_BE = ("torch", "safetensors", "lerobot", "transformers", "polars", "dlimp", "tensorflow", "pytest")


class Names(type):
    """A class in which every name is such a class."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = Names(name, (), {})
        setattr(cls, name, made)
        return made


class Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012  as a package has it

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = Names(name, (), {})
        setattr(self, name, made)
        return made


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what no other finder does, of the packages named above; and openpi's torch models."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT_MAY_BE:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(EmptyModules())
sys.path.insert(0, os.path.join(os.environ["OPENPI_DIR"], "packages", "openpi-client", "src"))
sys.path.insert(0, os.path.join(os.environ["OPENPI_DIR"], "src"))
sys.path.insert(0, os.environ["OPENPI_DIR"])
if any(isinstance(importlib.import_module(name), Empty) for name in ("torch", "transformers")):  # its torch models
    sys.modules["openpi.models_pytorch"] = Empty("openpi.models_pytorch")
    sys.modules["openpi.models_pytorch.pi0_pytorch"] = Empty("openpi.models_pytorch.pi0_pytorch")


def model_config(case: dict):
    """openpi's config of the case's model."""
    import openpi.models.gemma as gemma
    import openpi.models.lora as lora
    import openpi.models.pi0 as pi0
    import openpi.models.pi0_config as pi0_config
    import openpi.models.siglip as siglip

    def sizes(variant):
        own = case["trunk"] if "2b" in variant else case["expert"]
        rank = own["rank"] if "lora" in variant else 0
        updates = {part: lora.LoRAConfig(rank=rank, alpha=float(rank)) for part in ("attn", "ffn")} if rank else {}
        sizes = {name: own[name] for name in ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")}
        return gemma.Config(**sizes, lora_configs=updates)

    tower = siglip.decode_variant(case["siglip"])
    gemma.get_config = sizes
    gemma.PALIGEMMA_VOCAB_SIZE = case["vocab_size"]
    siglip.decode_variant = lambda variant: tower
    assert pi0._gemma is gemma and pi0._siglip is siglip
    suffix = "_lora" if case["lora"] else ""
    return pi0_config.Pi0Config(
        dtype=case["dtype"],
        paligemma_variant=f"gemma_2b{suffix}",
        action_expert_variant=f"gemma_300m{suffix}",
        action_horizon=case["horizon"],
        max_token_len=case["tokens"],
        pi05=case["family"] == "pi05",
    )


def random_batch(case: dict):
    """One fixed batch, as openpi's loader gives it: observation and actions."""
    import numpy as np
    import openpi.models.model as model_module

    rng = np.random.default_rng(0)
    rows = case["batch"]
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    observation = model_module.Observation(
        images={name: rng.uniform(-1, 1, (rows, 224, 224, 3)).astype(np.float32) for name in cameras},
        image_masks={name: np.ones(rows, bool) for name in cameras},
        state=rng.normal(size=(rows, 32)).astype(np.float32),
        tokenized_prompt=rng.integers(0, case["vocab_size"], (rows, case["tokens"])).astype(np.int32),
        tokenized_prompt_mask=np.ones((rows, case["tokens"]), bool),
    )
    return observation, rng.normal(size=(rows, case["horizon"], 32)).astype(np.float32)


def step(case: dict) -> dict:
    """The train step, as in scripts/train.py's main()."""
    import functools

    import jax
    import openpi.shared.array_typing as array_typing
    import openpi.training.config as config
    import openpi.training.sharding as sharding
    import scripts.train as train

    without_empty_modules()
    imported = time.perf_counter()
    model = model_config(case)
    cfg = config.TrainConfig(
        name="bench",
        exp_name="bench",
        model=model,
        freeze_filter=model.get_freeze_filter(),
        ema_decay=None if case["lora"] else 0.99,
        batch_size=case["batch"],
    )
    mesh = sharding.make_mesh(1)
    data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.DATA_AXIS))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    train_rng, init_rng = jax.random.split(jax.random.key(0))
    batch = jax.device_put(random_batch(case), data)
    state, placed = train.init_train_state(cfg, init_rng, mesh, resume=False)
    jax.block_until_ready(state)
    made = time.perf_counter()
    step = jax.jit(
        functools.partial(train.train_step, cfg),
        in_shardings=(replicated, placed, data),
        out_shardings=(placed, replicated),
        donate_argnums=(1,),
    )
    with sharding.set_mesh(mesh):
        with array_typing.disable_typechecking():  # it does not know the argument descriptions that lower() makes
            lowered = step.lower(train_rng, state, batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
        ready = time.perf_counter()
        loss = 0.0

        def once() -> None:
            nonlocal state, loss
            state, info = compiled(train_rng, state, batch)
            loss = float(info["loss"])

        walls, cpus = timed(once, case["steps"] + 1)
    return {
        "import_s": imported - began,
        "init_s": made - imported,
        "trace_s": traced - made,
        "compile_s": ready - traced,
        "wall_s": statistics.median(walls[1:]),
        "cpu_s": statistics.median(cpus[1:]),
        "loss": loss,
    }


def sample(case: dict) -> dict:
    """Requests one after another; the first one compiles, as in policies/policy.py."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import openpi.models.pi0  # noqa: F401  # before the empty modules go
    import openpi.shared.nnx_utils as nnx_utils
    from flax import nnx

    without_empty_modules()
    imported = time.perf_counter()
    model = model_config(case).create(jax.random.key(0))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if case["dtype"] == "bfloat16" else leaf, state)
    act = nnx_utils.module_jit(nnx.merge(graph, state).sample_actions)
    observation, _ = random_batch(case)
    made = time.perf_counter()

    def once() -> None:
        seen = jax.tree.map(jnp.asarray, observation)
        np.asarray(act(jax.random.key(1), seen, num_steps=case["flow_steps"]))

    (first,), _ = timed(once, 1)
    walls, cpus = timed(once, case["steps"])
    return {
        "import_s": imported - began,
        "init_s": made - imported,
        "compile_s": first,
        "first_s": walls[0],
        "wall_s": statistics.median(walls),
        "max_s": max(walls),
        "cpu_s": statistics.median(cpus),
    }


def without_empty_modules() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, Empty)]:
        del sys.modules[name]  # einops would ask it for torch's arrays


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    found = {"step": step, "sample": sample}[case["part"]](case)
    print(json.dumps(found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
