"""What the job of `hvd site check` reports, and what follows from it. Pure functions; imports no jax."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

DRIVER = 525  # of NVIDIA, the oldest that runs programs of CUDA 12
SEEN_S = 1.0  # within which a file that is renamed into place must be seen by the other node
CLOCK_S = 5.0  # that two clocks may differ
_GB = 1e9


@dataclass(frozen=True)
class Peer:
    """Another process as process 0 sees it by files: seconds until a renamed file is seen, and its clock minus ours."""

    seen_s: float
    clock_s: float


@dataclass(frozen=True)
class Devices:
    """What jax has found on a node by itself. `cuda`: of its own libraries, such as "12.8"; "" = none."""

    platform: str = ""
    count: int = 0
    kind: str = ""
    cuda: str = ""
    error: str = ""


@dataclass(frozen=True)
class Sum:
    """The all-reduce over all processes."""

    devices: int = 0
    megabytes: float = 0.0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What one process of the job knows so far; it reports again and again, the last one with `done`.

    Attributes:
        number: of the report, from 0.
        time: of its clock, when it wrote the report.
        folder: where runs would be written, and who wrote there.
        free: bytes that are free there; None = not known.
        gpus: that nvidia-smi shows; `driver` is theirs.
        peers: process 0's, by the number of the process; None = not measured.
        peers_error: why it saw no others.
    """

    process: int
    count: int
    host: str
    number: int
    time: float
    version: str = ""
    folder: str = ""
    user: int = -1
    storage_error: str = ""
    free: int | None = None
    gpus: int = 0
    driver: str = ""
    peers: dict[str, Peer] | None = None
    peers_error: str = ""
    devices: Devices | None = None
    sum: Sum | None = None
    done: bool = False


@dataclass(frozen=True)
class Asked:
    """What the job asks for, which is what a training with the same flags would.

    Attributes:
        gpus: of a node.
        limit: seconds of a training job; None = none.
        grace: seconds between the signal and the end, for the save.
        stop: seconds that the cluster itself gives between the two; None = what `grace` asks for.
        grace_option, limit_option: how they are set.
        space: bytes that must be free.
        version: of the code here; "" where it need not be that of the job.
    """

    nodes: int = 1
    processes: int = 1
    gpus: int = 0
    limit: int | None = None
    grace: int = 0
    stop: int | None = None
    limit_option: str = ""
    grace_option: str = ""
    space: int = 0
    version: str = ""


@dataclass(frozen=True)
class Finding:
    """A line of `hvd site check`. `text`: what was seen; for FAILED what to do, too."""

    name: str
    state: Literal["ok", "FAILED", "not checked"]
    text: str

    def line(self) -> str:
        return f"{self.name + ':':<12} {self.state}: {self.text}"


@dataclass
class Clock:
    """A node's clock minus this machine's, between two bounds: a report is written after it was asked for in vain, and
    before it is read."""

    low: float = float("-inf")
    high: float = float("inf")

    def heard(self, time: float, asked: float | None, read: float) -> None:
        self.low = max(self.low, time - read)
        self.high = min(self.high, time - asked) if asked is not None else self.high

    @property
    def skew(self) -> float:
        """The least that the clocks differ by."""
        return self.low if self.low > 0 else min(self.high, 0.0)


@dataclass
class Seen:
    """What was seen of the job.

    Attributes:
        reports: the last one of each process.
        clocks: of each process against this machine.
        images: node -> what it runs; {} where the cluster does not tell.
        trouble: why the job was given up or how it failed; "" = it did its work.
    """

    reports: dict[int, Report] = field(default_factory=dict)
    clocks: dict[int, Clock] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    trouble: str = ""

    def take(self, reports: Sequence[Report], asked: float | None, read: float) -> None:
        """Reports that were there at `read` and not all at `asked`, both by this machine's clock."""
        for one in reports:
            before = self.reports.get(one.process)
            if before is None or before.number < one.number:
                self.reports[one.process] = one
                self.clocks.setdefault(one.process, Clock()).heard(one.time, asked, read)


NAMES = ("job", "gpu", "cuda", "all-reduce", "storage", "rename", "clocks", "space", "version", "image")


def judge(seen: Seen, asked: Asked) -> list[Finding]:
    """A finding for each of NAMES."""
    reports = [seen.reports[number] for number in sorted(seen.reports)]
    found = [_job(seen, reports, asked)]
    if not reports:
        return found + [Finding(name, "not checked", "no process of the job has reported") for name in NAMES[1:]]
    parts = (_gpu, _cuda, _sum, _storage, _rename)
    found += [part(reports, asked) for part in parts]
    return [*found, _clocks(reports, seen.clocks), _space(reports, asked), _version(reports, asked), _image(seen)]


def time_limit(asked: Asked) -> Finding:
    if asked.stop is not None and asked.stop <= asked.grace:
        text = f"the save may take {asked.grace} s ({asked.grace_option}), and the cluster kills after {asked.stop}"
        return Finding("time limit", "FAILED", f"{text}: a longer terminationGracePeriodSeconds")
    if asked.limit is None:
        return Finding("time limit", "ok", f"none; {asked.grace} s for the save")
    if asked.limit < 2 * asked.grace:
        text = f"of {asked.limit} s the last {asked.grace} are for the save: less than half is left to train"
        return Finding(
            "time limit", "FAILED", f"{text}; a longer {asked.limit_option} or a shorter {asked.grace_option}"
        )
    return Finding("time limit", "ok", f"{asked.limit} s, the last {asked.grace} of them for the save")


def _job(seen: Seen, reports: Sequence[Report], asked: Asked) -> Finding:
    lacking = [str(number) for number in range(asked.processes) if number not in seen.reports]
    unfinished = [f"{one.process} on {one.host}" for one in reports if not one.done]
    if seen.trouble:
        return Finding("job", "FAILED", seen.trouble)
    if lacking or unfinished:
        which = f"process {', '.join(lacking or unfinished)} " + ("has not reported" if lacking else "did not end")
        return Finding("job", "FAILED", f"{which}; look at the node, and try again")
    for one in reports:
        if one.devices and one.devices.error and not asked.gpus:
            return Finding(
                "job", "FAILED", f"jax does not work on {one.host}: {one.devices.error}; mend the environment"
            )
    hosts = list(dict.fromkeys(one.host for one in reports))
    if len(hosts) < asked.nodes:
        return Finding("job", "FAILED", f"{asked.nodes} nodes were asked for, all processes are on {', '.join(hosts)}")
    return Finding("job", "ok", f"{asked.processes} process(es) on {', '.join(hosts)}")


def _gpu(reports: Sequence[Report], asked: Asked) -> Finding:
    if not asked.gpus:
        return Finding("gpu", "not checked", "the job is for CPUs; a config for GPUs, or the site's GPUs, would ask")
    for one in reports:
        if one.gpus < asked.gpus:
            what = f"{one.host} shows the job {one.gpus} GPUs of {asked.gpus} (nvidia-smi)"
            return Finding("gpu", "FAILED", f"{what}; ask for them as the site wants it, or look at the node's driver")
    for one in reports:
        if one.devices and (one.devices.error or one.devices.platform != "gpu"):
            why = one.devices.error or f"its platform is {one.devices.platform!r}"
            advice = "install hvd[cuda12], or use the image for GPUs"
            return Finding("gpu", "FAILED", f"jax sees none of {one.host}'s {one.gpus} GPUs ({why}); {advice}")
    unknown = [one.host for one in reports if one.devices is None]
    if unknown:
        return Finding("gpu", "not checked", f"jax's view is not known: {', '.join(unknown)} did not come so far")
    kinds = sorted({f"{one.gpus} {one.devices.kind}" for one in reports if one.devices})
    return Finding("gpu", "ok", f"{' and '.join(kinds)} a node, seen by jax")


def _cuda(reports: Sequence[Report], asked: Asked) -> Finding:
    if not asked.gpus:
        return Finding("cuda", "not checked", "the job is for CPUs")
    for one in reports:
        major = one.driver.partition(".")[0]
        if major.isdigit() and int(major) < DRIVER:
            return Finding("cuda", "FAILED", f"{one.host} has driver {one.driver}; CUDA 12 needs {DRIVER} or newer")
    known = [one for one in reports if one.driver and one.devices and one.devices.platform == "gpu"]
    if len(known) < len(reports):
        return Finding("cuda", "not checked", "jax or nvidia-smi did not work on every node, see gpu")
    pairs = sorted({f"driver {one.driver} with CUDA {one.devices.cuda or '12'}" for one in known if one.devices})
    return Finding("cuda", "ok", f"{' and '.join(pairs)}: a program ran")


def _sum(reports: Sequence[Report], asked: Asked) -> Finding:
    name, kind = "all-reduce", "NCCL" if asked.gpus else "gloo"
    if asked.processes == 1:
        return Finding(name, "not checked", "one process; --nodes 2 tries two")
    for one in reports:
        if one.sum is not None and one.sum.error:
            advice = (
                "firewalls and network policies must let the nodes talk on all ports; NCCL_SOCKET_IFNAME names the "
                "network, HVD_COORDINATOR another host name of process 0"
            )
            return Finding(name, "FAILED", f"{one.host}: {one.sum.error}; {advice}")
    done = [one.sum for one in reports if one.sum is not None]
    if len(done) < asked.processes:
        return Finding(name, "not checked", "not all processes came so far")
    slowest = max(done, key=lambda one: one.seconds)
    text = f"{slowest.megabytes:g} MB over {slowest.devices} devices in {slowest.seconds:.3f} s ({kind})"
    return Finding(name, "ok", text)


def _storage(reports: Sequence[Report], asked: Asked) -> Finding:
    for one in reports:
        if one.storage_error:
            advice = f"let user {one.user} write there, or name another folder with --runs_dir"
            return Finding("storage", "FAILED", f"{one.host}: {one.storage_error}; {advice}")
    return Finding("storage", "ok", f"user {reports[0].user} writes in {reports[0].folder}")


def _rename(reports: Sequence[Report], asked: Asked) -> Finding:
    if asked.processes == 1:
        return Finding("rename", "not checked", "one process; --nodes 2 tries two")
    first = reports[0]
    if first.process or any(one.storage_error for one in reports) or len(reports) < asked.processes:
        return Finding("rename", "not checked", "not all processes could write files")
    if first.peers_error:
        advice = f"{first.folder} must be the same folder on all nodes"
        return Finding("rename", "FAILED", f"{first.peers_error}; {advice}")
    if first.peers is None:
        return Finding("rename", "not checked", "process 0 did not come so far")
    slowest = max(peer.seen_s for peer in first.peers.values())
    if slowest > SEEN_S:
        advice = "NFS: mount with a short actimeo, such as 1"
        return Finding("rename", "FAILED", f"seen by the other node after {slowest:.1f} s; {advice}")
    return Finding("rename", "ok", f"seen by the other nodes within {slowest:.3f} s")


def _clocks(reports: Sequence[Report], clocks: Mapping[int, Clock]) -> Finding:
    first = reports[0]
    measured = {int(number): peer.clock_s for number, peer in (first.peers or {}).items()}
    hosts = {one.process: one.host for one in reports}
    apart = {f"{hosts.get(number, number)} and {first.host}": skew for number, skew in measured.items()}
    apart |= {f"{one.host} and this machine": clocks[one.process].skew for one in reports if one.process in clocks}
    for who, skew in sorted(apart.items(), key=lambda pair: -abs(pair[1])):
        if abs(skew) > CLOCK_S:
            return Finding(
                "clocks", "FAILED", f"{who} differ by {abs(skew):.0f} s or more; let all of them run an NTP client"
            )
        between = f"nodes {max(map(abs, measured.values())):.3f} s apart, " if measured else ""
        return Finding("clocks", "ok", f"{between}all within {CLOCK_S:g} s of this machine")
    return Finding("clocks", "not checked", "no clock was compared")


def _space(reports: Sequence[Report], asked: Asked) -> Finding:
    known = [(one.free, one) for one in reports if one.free is not None]
    if not known:
        return Finding("space", "not checked", "the storage does not tell")
    free, one = min(known, key=lambda pair: pair[0])
    text = f"{free / _GB:.1f} GB are free in {one.folder}"
    if free < asked.space:
        advice = f"less than --space {asked.space / _GB:g}; free some, or name another folder with --runs_dir"
        return Finding("space", "FAILED", f"{text} on {one.host}, {advice}")
    return Finding("space", "ok", text)


def _version(reports: Sequence[Report], asked: Asked) -> Finding:
    known = {one.host: one.version for one in reports if one.version}
    known |= {"this machine": asked.version} if asked.version else {}
    for (one, first), (other, second) in itertools.pairwise(known.items()):
        if first != second:
            advice = "bring all to one version: the same checkout, the same image"
            return Finding("version", "FAILED", f"{one} runs {first}, {other} {second}; {advice}")
    return Finding("version", "ok", f"{next(iter(known.values()), 'hvd of unknown version')} everywhere")


def _image(seen: Seen) -> Finding:
    if not seen.images:
        return Finding("image", "not checked", "the cluster does not tell what image runs on a node")
    if len(set(seen.images.values())) > 1:
        which = ", ".join(f"{node} {image}" for node, image in seen.images.items())
        return Finding("image", "FAILED", f"nodes run different images: {which}; name the image by its digest")
    return Finding("image", "ok", f"{next(iter(seen.images.values()))} on {', '.join(seen.images)}")
