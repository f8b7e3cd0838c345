"""A verdict as a table for people and as JSON for the launcher. Imports no jax."""

from typing import Any

from hvd.plan.advice import Change
from hvd.plan.devices import Cluster
from hvd.plan.verdict import Verdict

GIB = 1 << 30

_NOTES = {
    "gradients": "at the fullest moment",
    "activations": "kept for the backward pass",
    "temporaries": "",
    "batch": "one, uint8 images",
}


def text(verdict: Verdict, advice: tuple[Change, Verdict] | None) -> str:
    """The table, the verdict in a line, and what would make it fit."""
    cfg, own, cluster, measured = verdict.cfg, verdict.stage_cfg, verdict.cluster, verdict.measured
    rows = own.batch_size // cluster.count
    lines = [
        f"{verdict.stage} stage of {cfg.name} on {cluster}: mesh data {cluster.count // verdict.fsdp} x fsdp "
        f"{verdict.fsdp}, batch {own.batch_size} ({rows} a device, {own.grad_accum_steps} micro-batch(es)), "
        f"remat {own.remat}",
        f"{measured.parameters / 1e6:,.0f} M parameters, {measured.trained / 1e6:,.0f} M trained",
        "",
        "per device",
    ]

    def row(name: str, size: int, note: str = "") -> None:
        lines.append(f"  {name:<24}{size_text(size):>12}{'   ' + note if note else ''}")

    if measured.compiled:
        for name, size in measured.categories().items():
            if size:
                row(name, size, _NOTES.get(name, ""))
        how = "the GPU's compiler" if measured.compiler == "cuda" else "the CPU's compiler: an upper bound"
        row("peak", measured.peak, f"by {how}")
    else:
        for name, size in (measured.state | {"gradients": measured.gradients, "batch": measured.batch}).items():
            if size:
                row(name, size)
        row("at least", measured.least, "activations and temporaries come on top")
    row("batches placed ahead", verdict.ahead, "prefetched, validation")
    row("limit", verdict.limit, f"of {size_text(cluster.accelerator.usable)}; the rest is for CUDA, NCCL, libraries")
    lines += ["", conclusion(verdict)]
    if verdict.fits:
        lines += _speed(verdict)
    if advice is not None:
        change, better = advice
        lines.append(
            f"it fits with: {change.text(cluster)}   ({size_text(better.needed)} of {size_text(better.limit)})"
        )
    elif verdict.fits is False:
        lines.append("nothing that was tried makes it fit")
    return "\n".join([*lines, ""])


def conclusion(verdict: Verdict) -> str:
    """One line: does it fit, by how much."""
    needed, limit, least = size_text(verdict.needed), size_text(verdict.limit), size_text(verdict.least)
    if verdict.fits:
        return f"fits: {needed} of {limit}, {size_text(verdict.limit - verdict.needed)} are free"
    if verdict.fits is False:
        if verdict.least > verdict.limit:
            return f"does not fit: state, gradients and batch alone need {least}, a device has {limit}"
        return f"does not fit: it needs {needed}, a device has {limit}"
    if not verdict.measured.compiled:
        return f"may fit: it needs at least {least} of {limit}; nothing was compiled"
    return (
        f"may fit: it needs between {least} and {needed} of {limit}; the GPU's compiler knows better "
        "(uv sync --extra cuda12, no GPU needed)"
    )


def buffers(verdict: Verdict) -> str:
    """The largest places of the compiler's temporary block at its fullest, one a line."""
    lines = ["largest buffers when the step's memory is fullest, per device"]
    for size, kind, shape, what in verdict.measured.largest:
        lines.append(f"  {size_text(size):>12}  {kind:<12} {shape:<28} {what}")
    return "\n".join([*lines, ""])


def size_text(size: int) -> str:
    """1.23 GiB, or MiB where it is less than a tenth of one."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.2f} MiB"


def as_json(verdict: Verdict, advice: tuple[Change, Verdict] | None) -> dict[str, Any]:
    """The verdict, and the flags that make it fit ("" where none are known)."""
    cluster: Cluster = verdict.cluster
    return verdict.as_json() | {
        "conclusion": conclusion(verdict),
        "advice": advice[0].text(cluster) if advice else "",
        "advised_needed": advice[1].needed if advice else 0,
    }


def _speed(verdict: Verdict) -> list[str]:
    lines = []
    full, usual = verdict.step_seconds(1.0), verdict.step_seconds(0.4)
    flops = verdict.measured.flops or 0.0
    if full is not None and usual is not None and flops > 1e10:  # models of a laptop are bound by other things
        rate = verdict.stage_cfg.batch_size / usual
        lines.append(
            f"{flops / 1e12:,.1f} TFLOP a step: at best {full * 1e3:,.0f} ms, at 40 % of the peak "
            f"{usual * 1e3:,.0f} ms ({rate:,.1f} samples/s)"
        )
    lines.append(f"host memory of a node while a checkpoint is written: {size_text(verdict.host)}, and the loader's")
    return lines
