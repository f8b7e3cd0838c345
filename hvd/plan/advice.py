"""What would make it fit: changes in the order of what they cost, each tried with the compiler. Imports no jax."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hvd import accelerators
from hvd.plan.devices import Cluster
from hvd.plan.verdict import Verdict

MOST_OF_A_NODE = 8
REMAT = ("none", "dots", "full")
LORA_VARIANTS = {"gemma_2b": "gemma_2b_lora", "gemma_300m": "gemma_300m_lora"}  # of hvd.models.gemma.VARIANTS

type Judge = Callable[[list[str], Cluster], Verdict | None]
"""(further flags, devices) -> the stage's verdict; None where the config cannot be run so."""


@dataclass(frozen=True)
class Change:
    """Flags to add to the command line, and the devices (often those asked for)."""

    flags: tuple[str, ...]
    cluster: Cluster

    def text(self, asked: Cluster) -> str:
        """For pasting behind the same command."""
        words = list(self.flags)
        if self.cluster != asked:
            words += ["--devices", f"{self.cluster.per_node}x{self.cluster.name}"]
            if self.cluster.nodes != asked.nodes:
                words += ["--nodes", str(self.cluster.nodes)]
        return " ".join(words)


def search(base: Verdict, judge: Judge) -> tuple[Change, Verdict] | None:
    """The cheapest change with which the stage is known to fit; None where nothing that was tried does."""
    for chain in chains(base):
        found = _first_fitting(chain, judge)
        if found is not None:
            return found
    return None


def chains(base: Verdict) -> Iterator[list[Change]]:
    """Lists of changes, the less costly lists first; within a list memory falls from one to the next.

    1. the same training, slower: parameters over the whole node, then more recomputation, then micro-batches;
    2. another training: the smallest batch; LoRA;
    3. more devices; larger devices.
    """
    stage, cluster, own = base.stage, base.cluster, base.stage_cfg
    node = ("--fsdp_devices", "0") if base.fsdp < cluster.per_node else ()
    steps: list[tuple[str, ...]] = [node] if node else []
    steps += [(*node, f"--{stage}.remat", remat) for remat in REMAT[REMAT.index(own.remat) + 1 :]]
    thrifty = steps[-1] if steps else ()
    parts = [n for n in (2, 4, 8) if n > own.grad_accum_steps and own.batch_size % (n * cluster.count) == 0]
    micro_batches = [(f"--{stage}.grad_accum_steps", str(n)) for n in parts]
    steps += [(*thrifty, *flags) for flags in micro_batches]
    state_alone = base.measured.least - base.measured.batch
    if node or state_alone <= base.limit:  # else less than all of the state is not to be had so
        yield [Change(flags, cluster) for flags in steps]
        if own.batch_size > cluster.count:
            yield [Change((*thrifty, f"--{stage}.batch_size", str(cluster.count)), cluster)]
    lora = _lora_flags(base)
    if lora:
        yield [Change((*thrifty, *flags, *lora), cluster) for flags in [(), *micro_batches]]
    yield from ([change] for change in _more_devices(base, thrifty))
    yield from ([change] for change in _larger_devices(base, []))
    yield from ([change] for change in _larger_devices(base, thrifty))


def _first_fitting(chain: Sequence[Change], judge: Judge) -> tuple[Change, Verdict] | None:
    """The first that fits of a chain in which whatever follows one that fits does so too, with few questions."""
    if not chain:
        return None
    found: tuple[Change, Verdict] | None = None
    low, high, at = 0, len(chain), len(chain) - 1
    while low < high:
        verdict = judge(list(chain[at].flags), chain[at].cluster)
        if verdict is not None and verdict.fits:
            found, high = (chain[at], verdict), at
        else:
            low = at + 1
        at = (low + high) // 2
    return found


def _lora_flags(base: Verdict) -> list[str]:
    """Flags that make every expert a LoRA one; [] where they are, or where the trunk does not train anyway."""
    model, own = base.cfg.model, base.stage_cfg
    if own.freeze_filter != "auto":
        return []
    names = {"paligemma_variant": model.paligemma_variant, "action_expert_variant": model.action_expert_variant}
    if base.stage == "value":
        names = {"value_paligemma_variant": model.value_paligemma_variant or model.paligemma_variant}
        names["value_expert_variant"] = model.value_expert_variant
    better = {field: LORA_VARIANTS[name] for field, name in names.items() if name in LORA_VARIANTS}
    flags = [word for field, name in better.items() for word in (f"--model.{field}", name)]
    return flags + ([f"--{base.stage}.ema_decay", "0"] if flags and own.ema_decay else [])


def _more_devices(base: Verdict, flags: Sequence[str]) -> Iterator[Change]:
    cluster, rows = base.cluster, base.stage_cfg.batch_size
    per_node = cluster.per_node
    while per_node < MOST_OF_A_NODE and rows % (2 * per_node * cluster.nodes) == 0:
        per_node *= 2
        yield Change((*flags, *_whole_node(flags, base)), replace(cluster, per_node=per_node))


def _larger_devices(base: Verdict, flags: Sequence[str]) -> Iterator[Change]:
    """In the order of their memory; none that could not hold what the state alone needs."""
    known = sorted(accelerators.ACCELERATORS.items(), key=lambda item: (item[1].usable, item[0]))
    seen = base.cluster.accelerator.usable
    for name, accelerator in known:
        if accelerator.usable > max(seen * 1.05, base.least):
            seen = accelerator.usable
            yield Change(tuple(flags), replace(base.cluster, name=name, accelerator=accelerator))


def _whole_node(flags: Sequence[str], base: Verdict) -> list[str]:
    return [] if "--fsdp_devices" in flags or base.cfg.fsdp_devices == 0 else ["--fsdp_devices", "0"]
