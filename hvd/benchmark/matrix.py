"""The matrix of a benchmark: a TOML file -> data, value runs, tables and policies as items that wait for each other.

    title = "..."                     tasks = ["tote", "pick"]          data_seeds = [21, 22]
    config = "demo"                   rollouts = 100                    first_start = 2_000_000
    [common]                          # fields of every experiment, by dotted names
    "sim.num_optimal" = 5
    [of_task.pick]                    # of the experiments of one task
    "sim.operator_noise" = "steady"
    [elsewhere.blocks]                # a task that is not simulated here, but by a program of yours
    program = ["python", "blocks.py"]  experts = ["--episodes", "10"]  mixed = ["--episodes", "200"]
    [values.flat]                     # a further value run; the one without a name is always there
    "model.network_type" = "q"
    [policies.filter]                 # one policy; `value` names its value run
    "policy.extractor" = "filter"
    [[comparisons]]
    better = "filter"  than = "mixed"  kind = "primary"  at_least = 0.1

What policies share is made once: the data of a task and a data seed, a value run, the table of advantages. The program
of a task elsewhere makes recordings, `PROGRAM record FOLDER --seed N ARGUMENTS`, of the episodes from seed N on, and
plays policies, `PROGRAM play`, as `hvd rollouts` asks for it. In its words $NAME is a variable of the environment.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from hvd import documents, overrides
from hvd.checks import check_config
from hvd.configs import SIM_TASKS, EvaluateConfig, Experiment, PolicyConfig
from hvd.documents import Count
from hvd.errors import UserError, nearest
from hvd.experiments import get_config
from hvd.fields import Leaf, Mark, leaves, to_plain
from hvd.method.extraction import needs_ratio
from hvd.method.value_run import needed
from hvd.overrides import Flag

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,60}$")]
Fields = dict[str, Any]  # dotted name of a field -> value
# what lies beside the policies in an experiment's folder, and names of items
_TAKEN = ("data", "value", "table", "advantages", "evaluation", "recordings", "datasets", "configs", "logs")
_SEEDS_APART = 10_000  # the training seeds of a policy seed, and the episodes of a data seed, from the one before it


# how a policy learns from the data is said by the matrix alone; what it leaves out is the published method's
_LEARNS = ("weighting", "weighting_params", "extractor", "extractor_params", "score", "score_levels", "gate")


# no constraint on these texts: msgspec 0.22 crashes, now and then, over a constrained type inside such a union
class Comparison(Struct, forbid_unknown_fields=True):
    """Success of `better` minus success of `than`; of several names the one with the higher mean counts.

    Attributes:
        kind: primary ones are corrected for their number (Holm); a gate says whether the data can tell at all.
        at_least: the difference that was named beforehand.
    """

    better: str | list[str]
    than: str | list[str]
    kind: Literal["primary", "secondary", "gate"] = "secondary"
    at_least: float = 0.0


class Elsewhere(Struct, forbid_unknown_fields=True):
    """A task that a program simulates; `experts`, `mixed`: the arguments of its two recordings."""

    program: list[str]
    experts: list[str]
    mixed: list[str]

    def words(self, run: bool) -> tuple[str, ...]:
        """The program; to `run` it, with its variables filled in and files by their whole path (not run from here)."""
        if not run:
            return tuple(self.program)
        found = [os.path.expandvars(word) for word in self.program]
        unset = [word for word in found if "$" in word]
        if unset or not found:
            raise UserError(f"elsewhere: {unset[0]}: not set" if unset else "elsewhere: program has no word in it")
        if shutil.which(found[0]) is None:
            raise UserError(f"elsewhere: {found[0]}: there is no such program")
        return tuple(os.path.abspath(word) if os.sep in word and os.path.exists(word) else word for word in found)


class Matrix(Struct, forbid_unknown_fields=True):
    """The file's form."""

    title: str
    config: str
    tasks: Annotated[list[str], Meta(min_length=1)]
    data_seeds: Annotated[list[Count], Meta(min_length=1)]
    policies: Annotated[dict[Name, Fields], Meta(min_length=1)]
    policy_seeds: Annotated[list[Count], Meta(min_length=1)] = field(default_factory=lambda: [0])
    rollouts: Annotated[int, Meta(ge=1)] = 100
    first_start: Count = 2_000_000
    common: Fields = {}
    of_task: dict[Name, Fields] = {}
    elsewhere: dict[Name, Elsewhere] = {}
    values: dict[Name, Fields] = {}
    comparisons: list[Comparison] = []


@dataclass(frozen=True)
class Cell:
    """One policy: trained on one data set with one seed, tried out from the common starts."""

    task: str
    data_seed: int
    policy: str
    policy_seed: int


@dataclass(frozen=True)
class Item:
    """One piece of work: commands of hvd that run one after the other on the same config.

    Attributes:
        name: of its config, log and result.
        needs: names of the items that come first.
        steps: commands of hvd, or names of `commands`.
        cell: what its result is about; None for what cells share.
        commands: the words of steps that take more than a config, or that are programs of others.
        elsewhere: whose programs they are.
    """

    name: str
    cfg: Experiment
    steps: tuple[str, ...]
    needs: tuple[str, ...] = ()
    cell: Cell | None = None
    commands: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    elsewhere: Elsewhere | None = None

    def command(self, step: str) -> tuple[str, ...]:
        """The words of a step."""
        return self.commands.get(step, ("hvd", step, "--config-file", self.config))

    @property
    def config(self) -> str:
        """Its config's file, from the folder of the benchmark."""
        return os.path.join("configs", f"{self.name}.yaml")


def read(path: str) -> Matrix:
    """The matrix in the file; UserError where it is none, or names what is not there."""
    try:
        found = tomllib.loads(documents.read_bytes(Path(path).expanduser(), 1 << 20).decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    matrix = documents.convert(found, Matrix, path)
    known = (*SIM_TASKS, *matrix.elsewhere)
    for task in matrix.tasks:
        if task not in known:
            raise UserError(f"{path}: tasks: unknown task {task!r}{nearest(task, known)}")
    for where, tasks in (("of_task", matrix.of_task), ("elsewhere", matrix.elsewhere)):
        for task in tasks:
            if task not in matrix.tasks:
                raise UserError(f"{path}: {where}: {task!r} is not one of tasks{nearest(task, matrix.tasks)}")
    for name, values in (("tasks", matrix.tasks), ("data_seeds", matrix.data_seeds), ("seeds", matrix.policy_seeds)):
        if len(set(values)) < len(values):
            raise UserError(f"{path}: {name}: one of them stands there twice")
    for name in (*matrix.policies, *matrix.values):
        if name in _TAKEN:
            raise UserError(f"{path}: {name!r} cannot name a policy or value run: a folder beside it is called so")
    for comparison in matrix.comparisons:
        for name in (*names(comparison.better), *names(comparison.than)):
            if name not in matrix.policies:
                raise UserError(f"{path}: comparisons: unknown policy {name!r}{nearest(name, matrix.policies)}")
    return matrix


def names(one_or_more: str | list[str]) -> list[str]:
    return [one_or_more] if isinstance(one_or_more, str) else one_or_more


def items(matrix: Matrix, run: bool = True) -> list[Item]:
    """All items, in an order in which none waits for a later one; those of one task and data seed stand together.

    Raises:
        UserError: a field that is not there, a config that `hvd` would refuse, or (to `run` them) no such program.
    """
    data = [(task, seed) for seed in matrix.data_seeds for task in matrix.tasks]
    found = [item for task, seed in data for item in _of_data(matrix, task, seed, run)]
    counts = collections.Counter(item.name for item in found)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"two things of the matrix would be called {name}: give a policy or value run another name")
    return found


def _of_data(matrix: Matrix, task: str, seed: int, run: bool) -> Iterator[Item]:
    """The items of one task and data seed."""
    data, own = _data(matrix, task, seed), matrix.elsewhere.get(task)
    made = Item(f"{data.exp_name}-data", _shared(data), ("prepare",))
    yield _recorded(matrix, made, own, own.words(run), seed) if own else made
    known: dict[str, str] = {}  # folder of a table -> its item
    prepared = {data.exp_name}  # norm stats belong to an experiment's folder

    def first(cfg: Experiment, step: str) -> tuple[str, ...]:
        steps = (step,) if cfg.exp_name in prepared else ("norm-stats", step)
        prepared.add(cfg.exp_name)
        return steps

    for name, fields in matrix.policies.items():
        for policy_seed in matrix.policy_seeds:
            cfg, value = _policy(matrix, data, name, fields, policy_seed)
            before = f"{data.exp_name}-data"
            if needed(cfg):
                if value.exp_name not in known:
                    before = f"{value.exp_name}-value"
                    known[value.exp_name] = before
                    yield Item(before, _shared(value), first(value, "train-value"), (f"{data.exp_name}-data",))
                before = f"{cfg.exp_name}-table"
                if before not in known:
                    known[before] = before
                    steps, needs = first(cfg, "advantages"), (known[value.exp_name],)
                    yield Item(before, _table(matrix, data, cfg, policy_seed), steps, needs)
            cell = Cell(task, seed, name, policy_seed)
            called = f"{data.exp_name}-{name}" + (f"-r{policy_seed}" if policy_seed else "")
            item = Item(called, cfg, ("train-policy", "evaluate"), (before,), cell)
            yield _played(item, task, own, own.words(run)) if own else item


def _recorded(matrix: Matrix, item: Item, own: Elsewhere, program: tuple[str, ...], seed: int) -> Item:
    """The data of a task elsewhere: two sets of recordings, converted."""
    commands: dict[str, tuple[str, ...]] = {}
    cfg, most = item.cfg, _SEEDS_APART // 2
    sets = (("experts", cfg.optimal_data, own.experts, 0), ("mixed", cfg.suboptimal_data, own.mixed, most))
    for name, data, arguments, offset in sets:
        folder, first = os.path.join(cfg.exp_dir, "recordings", name), seed * _SEEDS_APART + offset
        if first < matrix.first_start + matrix.rollouts and matrix.first_start < first + most:
            raise UserError(f"first_start {matrix.first_start}: the data of seed {seed} are recorded from {first} on")
        commands[f"record-{name}"] = (*program, "record", folder, "--seed", str(first), *arguments)
        target = ("--repo-id", data.repo_id, "--root", str(data.path()), "--robot", cfg.robot, "--cameras")
        commands[f"convert-{name}"] = ("hvd", "convert", "--raw-dirs", folder, *target)
    return dataclasses.replace(item, steps=(*commands, *item.steps), commands=commands, elsewhere=own)


def _played(item: Item, task: str, own: Elsewhere, program: tuple[str, ...]) -> Item:
    """A policy of a task elsewhere: its program plays."""
    words = (*item.command("rollouts"), "--task", task, "--", *program, "play")
    return dataclasses.replace(item, steps=("train-policy", "rollouts"), commands={"rollouts": words}, elsewhere=own)


def _table(matrix: Matrix, data: Experiment, cfg: Experiment, policy_seed: int) -> Experiment:
    """That of the table of all policies in the folder of `cfg`: with the expert ratio where one of them needs it."""
    sharing = [_policy(matrix, data, *policy, policy_seed)[0] for policy in matrix.policies.items()]
    sharing = [other for other in sharing if other.exp_name == cfg.exp_name and needed(other)]
    kept = {leaf.name.partition(".")[2]: leaf.of(cfg) for leaf in _in_table()} | {"value_run": cfg.policy.value_run}
    policy = dataclasses.replace(PolicyConfig(), **{name: kept[name] for name in kept if hasattr(cfg.policy, name)})
    if any(needs_ratio(other) for other in sharing):
        policy = dataclasses.replace(policy, extractor="filter", score="ratio")
    return dataclasses.replace(_shared(cfg), policy=policy)


def _data(matrix: Matrix, task: str, seed: int) -> Experiment:
    """The experiment that makes the data and, without changes, the value run."""
    name = f"{task}-{seed}"
    fields: Fields = {"sim.seed": seed, "seed": seed, "sim.image_size": 0, "sim.workers": 1}
    fields |= matrix.common | matrix.of_task.get(task, {})
    fields |= {"sim.task": task, "exp_name": name, "runs_dir": "runs", "assets_dir": f"assets/{name}"}
    if task in matrix.elsewhere:
        root = os.path.join("runs", name, "datasets")
        fields |= {"sim.task": "", "optimal_data.root": f"{root}/optimal", "suboptimal_data.root": f"{root}/mixed"}
    fields |= {"evaluate.num_rollouts": matrix.rollouts, "evaluate.seed": matrix.first_start}
    fields |= {"evaluate.baselines": False, "evaluate.workers": 1, "evaluate.videos": 0}
    base, published = get_config(matrix.config), PolicyConfig()
    policy = dataclasses.replace(base.policy, **{name: getattr(published, name) for name in _LEARNS})
    return _changed(dataclasses.replace(base, policy=policy), fields, "common").resolved()


def _policy(
    matrix: Matrix, data: Experiment, name: str, fields: Fields, policy_seed: int
) -> tuple[Experiment, Experiment]:
    """A policy's experiment and that of its value run. Policies whose tables differ have folders of their own."""
    own = dict(fields)
    which = str(own.pop("value", ""))
    if which and which not in matrix.values:
        raise UserError(f"policies.{name}: unknown value run {which!r}{nearest(which, matrix.values)}")
    value = _changed(data, matrix.values.get(which, {}), f"values.{which}")
    if which:
        value = dataclasses.replace(value, exp_name=f"{data.exp_name}-{which}")
    cfg = _changed(value, {"evaluate.checks": False, **own}, f"policies.{name}")
    for leaf in leaves(Experiment).values():
        group = leaf.name.partition(".")[0]
        if group not in ("policy", "suboptimal_data", "evaluate") and leaf.of(cfg) != leaf.of(value):
            raise UserError(f"policies.{name}: {leaf.name} is not the policy's own; a [values.NAME] may change it")
    again = f"-r{policy_seed}" if policy_seed else ""
    policy, folder = dataclasses.replace(cfg.policy, run_name=name + again), data.exp_name
    if needed(cfg):
        shown = [leaf for leaf in leaves(Experiment).values() if leaf.name.startswith("suboptimal_data.")]
        differing = [leaf for leaf in (*_in_table(), *shown) if leaf.of(cfg) != leaf.of(value)]
        apart = "".join(f"-{_word(leaf.of(cfg))}" for leaf in differing) + again
        if apart and not policy.value_run:
            policy = dataclasses.replace(policy, value_run=value.value_dir)
        folder = value.exp_name + apart
    cfg = dataclasses.replace(cfg, policy=policy, exp_name=folder, seed=data.seed + _SEEDS_APART * policy_seed)
    check_config(cfg)
    return cfg, value


def _in_table() -> list[Leaf]:
    """The policy's fields that a table of advantages depends on."""
    found = leaves(Experiment).values()
    return [leaf for leaf in found if Mark.IN_TABLE in leaf.marks and leaf.name.startswith("policy.")]


def _shared(cfg: Experiment) -> Experiment:
    """What data and value runs depend on: the same for every policy and every number of rollouts."""
    plain = EvaluateConfig()
    short = dataclasses.replace(plain, execute_steps=min(plain.execute_steps, cfg.model.action_horizon))
    return dataclasses.replace(cfg, policy=PolicyConfig(), evaluate=short)


def _changed(cfg: Experiment, fields: Mapping[str, Any], where: str) -> Experiment:
    """The experiment with fields by their dotted names, as on a command line."""
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    try:
        return overrides.apply(
            cfg, [Flag(f"--{name}", name.replace("-", "_"), (word,)) for name, word in words.items()]
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", str(value)).strip("_")


def plain(cfg: Experiment) -> str:
    """The config of an item as its file says it."""
    import yaml

    return yaml.safe_dump(to_plain(cfg), sort_keys=False)
