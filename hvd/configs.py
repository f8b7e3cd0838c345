"""The fields of an experiment: one tree of frozen dataclasses, named ones in hvd/experiments.py. Every field can be
overridden on the command line by its dotted name (`--model.method expectile --value.batch_size 64`). Imports no jax:
login nodes read it.

Field names follow the original code base and openpi where they have one (method, network_type, hierarchical_actions,
action_horizon, optimal_data, suboptimal_data, weight_loader, freeze_filter, fsdp_devices, batch_size, num_workers).
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd.fields import (
    AT_LEAST_1,
    DECAY,
    FREE,
    IF_SET,
    IN_TABLE,
    INSIDE,
    NO_MEMORY,
    NOT_NEGATIVE,
    POLICY_RUN,
    POSITIVE,
    SHARE,
    SIZE,
    VALUE_RUN,
    group,
    one_of,
    option,
)
from hvd.robots import get_robot

NetworkType = Literal["hierarchical_q", "q"]
Role = Literal["optimal", "mixed", "rollouts"]
# The simulated tasks: hvd/sim/tasks has one module each (listed, not imported: it needs mujoco).
SIM_TASKS = tuple(sorted(path.stem for path in (Path(__file__).parent / "sim/tasks").glob("[!_]*.py")))


@dataclass(frozen=True)
class ModelConfig:
    """The trunk that both stages share, the policy's and the value model's own experts, and what the values mean."""

    family: Literal["pi0", "pi05"] = option("pi0", IF_SET, "pi05: state in the prompt, time in the expert's norms")
    action_dim: int = option(32, AT_LEAST_1, "robot dims are zero-padded to this; the state too")
    action_horizon: int = option(20, AT_LEAST_1, "K, actions per chunk")
    max_token_len: int = option(48, AT_LEAST_1, "tokens of a prompt; a longer one is cut")
    state_in_prompt: Literal["auto", "yes", "no"] = option("auto", IF_SET, "one of 256 bins a dim; auto: with pi05")
    vocab_size: int = option(257_152, AT_LEAST_1)
    tokenizer: Literal["paligemma", "words"] = option("paligemma", '"words": hashed, needs no vocabulary file')
    tokenizer_path: str = option("", 'sentencepiece model of "paligemma"')
    dtype: Literal["bfloat16", "float32"] = option("bfloat16")
    paligemma_variant: str = option("gemma_2b", "names of hvd.models.gemma.VARIANTS")
    action_expert_variant: str = option("gemma_300m", POLICY_RUN)
    value_expert_variant: str = option("gemma_300m", VALUE_RUN)
    siglip_variant: str = option("So400m/14", "names of hvd.models.siglip.VARIANTS")
    cameras: tuple[str, ...] = option(
        ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), "none = the policy sees no image"
    )
    image_size: int = option(224, AT_LEAST_1)
    method: str = option("exponential", IN_TABLE, "names of hvd.method.objectives.OBJECTIVES")
    method_params: dict[str, float] = option({}, IF_SET, "numbers that the method declares beside alpha and tau")
    network_type: NetworkType = option("hierarchical_q")
    hierarchical_actions: tuple[tuple[int, ...], ...] = option(
        (), "dims per level, root first, as JSON: '[[7,8,9],[0,1]]'; none = the robot's own levels"
    )
    alpha: float = option(
        1.0, POSITIVE, IN_TABLE, 'temperature of "exponential"; advantage 0 weighs alpha^2 (see policy.bc_lambda)'
    )
    tau: float = option(0.7, INSIDE, IN_TABLE, 'asymmetry of "expectile" and "quantile"')
    action_patch: int = option(1, AT_LEAST_1, VALUE_RUN, "value model: actions of a level per token; divides horizon")
    # FREE: the trunk that a value run ends up with is what is compared (run_dir.identity)
    value_paligemma_variant: str = option("", FREE, 'the value model\'s trunk; "" = paligemma_variant')
    attention: Literal["auto", "xla", "cudnn"] = option("auto", FREE, "auto: measured to be fastest on the platform")

    @property
    def spells_state(self) -> bool:
        """Does each sample's prompt hold its state?"""
        return self.state_in_prompt == "yes" or (self.state_in_prompt == "auto" and self.family == "pi05")


@dataclass(frozen=True)
class KeyMap:
    """Repack: which column of the LeRobot dataset is which input of the model. Several columns are concatenated;
    "key[0,1,5]" or "key[0:3]" takes some dims of one."""

    images: dict[str, str] = option(
        {
            "base_0_rgb": "observation.images.head",
            "left_wrist_0_rgb": "observation.images.left_wrist",
            "right_wrist_0_rgb": "observation.images.right_wrist",
        },
        "the model's camera and the dataset's key, pair by pair",
    )
    state: tuple[str, ...] = option(("observation.state",))
    actions: tuple[str, ...] = option(("action",))
    rewards: str = option("", '"" = next.reward, else reward, whichever is there')
    terminal: str = option("", '"" = terminal, else next.terminal or next.done, whichever is there')


@dataclass(frozen=True)
class DataConfig:
    """One LeRobot dataset (v2.0, v2.1 or v3.0) of an experiment."""

    repo_id: str = option("", '"" = no such dataset')
    # what a dataset holds is compared by its digest, not where it lies
    root: str = option("", FREE, 'its folder; "" = $HF_LEROBOT_HOME/repo_id')
    keys: KeyMap = group(KeyMap)
    reward: Literal["column", "labels", "success_at_end"] = option("column", "labels: those of labels_dir")
    labels_dir: str = option("", FREE, 'where those label files lie; "" = <dataset>/labels')
    success_only: bool = option(False, "leave out episodes whose label says that they failed")
    max_episodes: int = option(0, NOT_NEGATIVE, "the first ones only; 0 = all")
    role: Literal["", "optimal", "mixed", "rollouts"] = option(
        "", IF_SET, 'optimal: imitated; others: weighed; "" = optimal, mixed of suboptimal_data, else rollouts'
    )
    share: float = option(
        0.0,
        SHARE,
        IF_SET,
        "of each batch; sets of share 0 divide what is left by policy.suboptimal_share, or by frames",
    )

    def path(self) -> Path:
        if self.root:
            return Path(self.root)
        home = os.environ.get("HF_LEROBOT_HOME") or Path("~/.cache/huggingface/lerobot").expanduser()
        return Path(home).expanduser() / self.repo_id


@dataclass(frozen=True)
class NormConfig:
    """Normalisation of state and actions; statistics come from the optimal set and are shared by all sets."""

    mode: Literal["z_score", "quantile"] = option("z_score")
    std_floor: float = option(0.0, NOT_NEGATIVE, "a constant dim otherwise explodes as soon as it moves")
    delta_actions: bool = option(False, "position dims of actions relative to the state at the chunk's start")


@dataclass(frozen=True)
class LrSchedule:
    kind: Literal["cosine", "rsqrt"] = option("cosine")
    warmup_steps: int = option(1_000, NOT_NEGATIVE)
    peak_lr: float = option(2.5e-5, POSITIVE)
    decay_steps: int = option(30_000, AT_LEAST_1)
    decay_lr: float = option(2.5e-6, NOT_NEGATIVE)
    timescale: float = option(10_000.0, POSITIVE, 'of "rsqrt"')


@dataclass(frozen=True)
class Optimizer:
    """AdamW after clipping by global norm."""

    b1: float = option(0.9, DECAY)
    b2: float = option(0.95, DECAY)
    eps: float = option(1e-8, POSITIVE)
    weight_decay: float = option(1e-10, NOT_NEGATIVE)
    clip_gradient_norm: float = option(1.0, POSITIVE)


@dataclass(frozen=True)
class StageConfig:
    """What both stages have."""

    num_train_steps: int = option(30_000, AT_LEAST_1, FREE)
    batch_size: int = option(16, AT_LEAST_1, "over all devices of all nodes")
    lr_schedule: LrSchedule = group(LrSchedule)
    optimizer: Optimizer = group(Optimizer)
    ema_decay: float = option(0.0, DECAY, "EMA of the trained parameters for inference; 0 = none")
    weight_loader: str = option("", 'an openpi checkpoint\'s `params` (local path or URL); "" = random')
    freeze_filter: Literal["auto", "trunk", "none"] = option(
        "auto",
        "auto: with a LoRA variant that expert's own weights are frozen; trunk: all of PaliGemma (image tower, first "
        "expert) is frozen, only the second expert and the heads train; none: everything trains",
    )
    grad_accum_steps: int = option(1, AT_LEAST_1, FREE, "micro-batches that one step scans over; divides batch_size")
    remat: Literal["none", "dots", "full"] = option(
        "none", FREE, "what the backward pass recomputes: nothing, all but matrix products, all"
    )
    augment_images: bool = option(True)
    crop: float = option(0.95, SIZE, "augmentation: side of the random crop, part of the image's; not of wrist cameras")
    rotation: float = option(5.0, NOT_NEGATIVE, "augmentation: degrees at most, either way")
    wrist_cameras: tuple[str, ...] = option(
        ("wrist",), IF_SET, "cameras whose name holds one of these are fixed to a hand: neither cropped nor turned"
    )
    state_noise: float = option(0.0, NOT_NEGATIVE, "std of noise on the normalised state, against overfitting")
    log_interval: int = option(100, AT_LEAST_1, FREE)
    val_interval: int = option(1_000, AT_LEAST_1, FREE)
    val_batches: int = option(4, NOT_NEGATIVE, FREE)
    save_interval: int = option(1_000, AT_LEAST_1, FREE)
    keep_period: int = option(5_000, NOT_NEGATIVE, FREE, "checkpoints at multiples are kept; of the others the last")
    trace_samples: bool = option(False, FREE, "write the visited sample indices of every step to samples.jsonl")


@dataclass(frozen=True)
class ValueConfig(StageConfig):
    """The value stage: V and the levels' Q."""

    num_train_steps: int = option(30_001, AT_LEAST_1, FREE)
    data: Literal["optimal", "mixed", "both"] = option("optimal", "the original README trains on the optimal set")
    gamma: float = option(0.99, SIZE, "per step")
    target_ema: float = option(0.005, SIZE, "the target network moves by this share each step")
    next_images: Literal["true", "current"] = option("true", "images at t+K, or (cheap) those at t with the next state")
    exp_clip_log: float = option(1.791759469228055, POSITIVE, 'log(6): gradient clip of "exponential" as IDQL does')


@dataclass(frozen=True)
class PolicyConfig(StageConfig):
    """The policy stage: weighted flow matching."""

    run_name: str = option("policy", FREE, "its folder below the experiment's")
    weighting: str = option("hvd", IN_TABLE, "names of hvd.method.weights.WEIGHTINGS; none = imitation")
    weighting_params: dict[str, float] = option({}, IF_SET, "numbers that the weighting declares beside beta")
    extractor: str = option("weighted", IF_SET, "names of hvd.method.extraction.EXTRACTORS: value run -> rows, weights")
    extractor_params: dict[str, float] = option({}, IF_SET, "numbers that the extractor declares")
    score: Literal["td", "ratio", "both"] = option("td", IF_SET, "filter, soft: by A, the expert ratio, ranks of both")
    score_levels: Literal["own", "chain", "joint", "mean"] = option("own", IF_SET, "chain: given the parents' actions")
    oracle_waiting: bool = option(False, IF_SET, "oracle: a level that waits for another's mistake is wrong too")
    gate: Literal["none", "success", "reward"] = option("none", IF_SET, "weighted rows whose episode succeeds, is paid")
    # FREE: its digest is among the run's inputs
    value_run: str = option("", FREE, NO_MEMORY, 'folder of a complete value run; "" = the experiment\'s own')
    advantage: Literal["q_minus_v", "marginal"] = option("q_minus_v", IN_TABLE)
    beta: float = option(3.0, POSITIVE, IN_TABLE, 'of "awr"')
    weight_clip: float = option(100.0, POSITIVE, IN_TABLE)
    bc_lambda: float = option(1.0, NOT_NEGATIVE, "L = L_RL(suboptimal) + bc_lambda L_BC(optimal); L_RL ~ alpha^2")
    suboptimal_share: float = option(0.5, SHARE, "of each batch; 0 = the optimal set alone, 1 = the suboptimal alone")
    num_flow_steps: int = option(10, AT_LEAST_1, FREE, "Euler steps when acting")
    prefix_max: int = option(0, NOT_NEGATIVE, IF_SET, "longest prefix of given actions, trained in; 0 = none")


@dataclass(frozen=True)
class EvaluateConfig:
    """How a policy is tried out."""

    num_rollouts: int = option(40, AT_LEAST_1, FREE)
    seed: int = option(1_000_000, NOT_NEGATIVE, FREE, "rollouts never share a seed with the data")
    execute_steps: int = option(10, AT_LEAST_1, FREE, "actions of a chunk that are executed before the next is asked")
    delay: int = option(0, NOT_NEGATIVE, FREE, "control steps from the question to the chunk; the old one goes on")
    chunking: Literal["replace", "ensemble", "guided", "prefix"] = option("replace", FREE, "how a late chunk goes on")
    workers: int = option(2, AT_LEAST_1, FREE)
    videos: int = option(3, NOT_NEGATIVE, FREE)
    action_samples: int = option(8, AT_LEAST_1, FREE, "held-out action error: also of the mean of so many chunks")
    baselines: bool = option(False, FREE, "also imitation of three kinds; by a score: published, twin")
    val_fraction: float = option(0.1, DECAY, "of the episodes of every dataset, held out from training")
    checks: bool = option(True, FREE, "simulated tasks: also doing nothing, who erred, which chunks a score trusts")


@dataclass(frozen=True)
class SimConfig:
    """The simulated R1's recordings; task "" = no simulation, the data are the user's."""

    task: str = option("", one_of(lambda: ("", *SIM_TASKS)), "a module of hvd/sim/tasks; empty = no simulation")
    num_optimal: int = option(40, AT_LEAST_1)
    num_mixed: int = option(160, AT_LEAST_1)
    image_size: int = option(96, NOT_NEGATIVE, "of the recorded cameras, pixels; 0 = no cameras")
    seed: int = option(0, NOT_NEGATIVE)
    horizon: int = option(200, AT_LEAST_1, "control steps of an episode at most, at 10 Hz")
    operator: str = option("casual", "who records the mixed set: names of hvd.sim.operators.OPERATORS")
    mistake_rate: float = option(1.0, SHARE, "chance that an opportunity of a bad level is a mistake; not of casual")
    noticed: float = option(0.5, SHARE, "chance that a mistake which ends the attempt is noticed first; not of casual")
    operator_noise: Literal["clumsy", "steady"] = option("clumsy", "steady: acts and sees as exactly as the expert")
    workers: int = option(2, AT_LEAST_1)


@dataclass(frozen=True)
class Experiment:
    """One experiment: two datasets or more, a value run and one or more policy runs."""

    name: str = dataclasses.field(metadata={"marks": frozenset({FREE, NO_MEMORY})})
    exp_name: str = option("", FREE, NO_MEMORY, 'folder below runs_dir; "" = name')
    robot: str = option("r1", "names of hvd.robots.ROBOTS")
    runs_dir: str = option("runs", FREE, NO_MEMORY)
    assets_dir: str = option("assets", FREE, NO_MEMORY, "folder of the norm stats")
    seed: int = option(0, NOT_NEGATIVE)
    fsdp_devices: int = option(1, NOT_NEGATIVE, FREE, "devices that share a copy of the parameters; 0 = a node's")
    deterministic: bool = option(False, FREE, "bit-equal results on a GPU too, at some cost of speed")
    num_workers: int = option(4, NOT_NEGATIVE, FREE, "decoding threads of a process")
    image_cache: bool = option(False, FREE, "decode each video once into a memory-mapped file of model-sized frames")
    wandb: bool = option(False, FREE, NO_MEMORY, "log to Weights & Biases too")
    accelerator: Literal["gpu", "cpu"] = option("gpu", FREE, "what the launcher asks a cluster for")
    hang_timeout: float = option(1800.0, NOT_NEGATIVE, FREE, "seconds without a step, then stacks and end; 0 = never")
    model: ModelConfig = group(ModelConfig)
    norm: NormConfig = group(NormConfig)
    optimal_data: DataConfig = group(DataConfig, NO_MEMORY)
    suboptimal_data: DataConfig = group(DataConfig, NO_MEMORY)
    more_data: dict[str, DataConfig] = option(
        {},
        IF_SET,
        NO_MEMORY,
        "further sets by names of yours: --more_data.day3.repo_id NAME --more_data.day3.share 0.2",
    )
    value: ValueConfig = group(ValueConfig, VALUE_RUN)
    policy: PolicyConfig = group(PolicyConfig, POLICY_RUN)
    evaluate: EvaluateConfig = group(EvaluateConfig, NO_MEMORY)
    sim: SimConfig = group(SimConfig, FREE, NO_MEMORY)

    @property
    def exp_dir(self) -> str:
        return os.path.join(self.runs_dir, self.exp_name or self.name)

    @property
    def value_dir(self) -> str:
        return os.path.join(self.exp_dir, "value")

    @property
    def policy_dir(self) -> str:
        return os.path.join(self.exp_dir, self.policy.run_name)

    @property
    def advantages_dir(self) -> str:
        return os.path.join(self.exp_dir, "advantages")

    @property
    def value_run_dir(self) -> str:
        """The value run that the policy takes."""
        return self.policy.value_run or self.value_dir

    def sets(self) -> dict[str, DataConfig]:
        """The sets "optimal", "suboptimal" and those of more_data, in this order; they may name no dataset."""
        return {"optimal": self.optimal_data, "suboptimal": self.suboptimal_data, **self.more_data}

    def datasets(self) -> tuple[tuple[str, DataConfig], ...]:
        """(name, dataset) of the sets that the experiment has."""
        return tuple((name, data) for name, data in self.sets().items() if data.repo_id or data.root)

    def resolved(self) -> "Experiment":
        """The same with the folders of simulated data filled in; call it once after overrides."""
        if not self.sim.task:
            return self
        changed = {}
        for name, folder in (("optimal_data", "optimal"), ("suboptimal_data", "mixed")):
            data: DataConfig = getattr(self, name)
            if data.repo_id and not data.root:
                changed[name] = dataclasses.replace(data, root=os.path.join(self.exp_dir, "datasets", folder))
        return dataclasses.replace(self, **changed)

    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Action dims per Q: the hierarchy's levels, or all dims at once for network_type "q"."""
        levels = self.model.hierarchical_actions or get_robot(self.robot).level_dims
        if self.model.network_type == "q":
            return (tuple(sorted(d for level in levels for d in level)),)
        return levels

    def level_names(self) -> tuple[str, ...]:
        robot = get_robot(self.robot)
        if self.model.network_type == "q":
            return ("all",)
        if self.levels() == robot.level_dims:
            return robot.level_names
        return tuple(f"level_{i}" for i in range(len(self.levels())))
