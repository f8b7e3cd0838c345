"""The fields of an experiment: one tree of frozen dataclasses, named ones in hvd/experiments.py. Every field can be
overridden on the command line by its dotted name (`--model.method expectile --value.batch_size 64`). Imports no jax:
login nodes read it.

Field names follow the original code base and openpi where they have one (method, network_type, hierarchical_actions,
action_horizon, optimal_data, suboptimal_data, weight_loader, freeze_filter, fsdp_devices, batch_size, num_workers).
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvd.robots import get_robot

Method = Literal["exponential", "expectile", "quantile"]
NetworkType = Literal["hierarchical_q", "q"]
Weighting = Literal["hvd", "awr", "none"]


@dataclass(frozen=True)
class ModelConfig:
    """The trunk that both stages share, the policy's and the value model's own experts, and what the values mean."""

    action_dim: int = 32  # robot dims are zero-padded to this; the state too
    action_horizon: int = 20  # K, actions per chunk
    max_token_len: int = 48
    vocab_size: int = 257_152
    tokenizer: Literal["paligemma", "words"] = (
        "paligemma"  # "words": hashed words, for tiny models without a vocabulary file
    )
    tokenizer_path: str = ""  # sentencepiece model of "paligemma"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    paligemma_variant: str = "gemma_2b"  # names of hvd.models.gemma.VARIANTS
    action_expert_variant: str = "gemma_300m"
    value_expert_variant: str = "gemma_300m"
    siglip_variant: str = "So400m/14"  # names of hvd.models.siglip.VARIANTS
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # () = the policy sees no image
    image_size: int = 224
    method: Method = "exponential"
    network_type: NetworkType = "hierarchical_q"
    hierarchical_actions: tuple[tuple[int, ...], ...] = ()  # dims per level, root first; () = the robot's own levels
    alpha: float = 1.0  # temperature of "exponential"; a frame of advantage 0 weighs alpha^2 (see policy.bc_lambda)
    tau: float = 0.7  # asymmetry of "expectile" and "quantile"
    action_patch: int = 1  # value model: consecutive actions of a level per token; divides action_horizon
    value_paligemma_variant: str = ""  # the value model's trunk; "" = paligemma_variant
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # auto: what was measured to be fastest on the platform


@dataclass(frozen=True)
class KeyMap:
    """Repack: which column of the LeRobot dataset is which input of the model. Several columns are concatenated;
    "key[0,1,5]" or "key[0:3]" takes some dims of one."""

    images: dict[str, str] = field(  # the model's camera -> the dataset's key
        default_factory=lambda: {
            "base_0_rgb": "observation.images.head",
            "left_wrist_0_rgb": "observation.images.left_wrist",
            "right_wrist_0_rgb": "observation.images.right_wrist",
        }
    )
    state: tuple[str, ...] = ("observation.state",)
    actions: tuple[str, ...] = ("action",)
    rewards: str = ""  # "" = next.reward, else reward, whichever is there
    terminal: str = ""  # "" = terminal, else next.terminal or next.done, whichever is there


@dataclass(frozen=True)
class DataConfig:
    """One LeRobot dataset (v2.1 or v3.0) of an experiment."""

    repo_id: str = ""  # "" = no such dataset
    root: str = ""  # its folder; "" = $HF_LEROBOT_HOME/repo_id
    keys: KeyMap = field(default_factory=KeyMap)
    reward: Literal["column", "labels", "success_at_end"] = (
        "column"  # labels: episode_NNNNNN.labels.json beside the dataset
    )
    labels_dir: str = ""  # where those label files lie; "" = <dataset>/labels
    success_only: bool = False
    max_episodes: int = 0  # 0 = all

    def path(self) -> Path:
        if self.root:
            return Path(self.root)
        home = os.environ.get("HF_LEROBOT_HOME") or Path("~/.cache/huggingface/lerobot").expanduser()
        return Path(home) / self.repo_id


@dataclass(frozen=True)
class NormConfig:
    """Normalisation of state and actions; statistics come from the optimal set and are shared by all sets."""

    mode: Literal["z_score", "quantile"] = "z_score"
    std_floor: float = 0.0  # a constant dim otherwise explodes as soon as it moves
    delta_actions: bool = False  # actions relative to the state at the chunk's start, for the robot's position dims


@dataclass(frozen=True)
class LrSchedule:
    kind: Literal["cosine", "rsqrt"] = "cosine"
    warmup_steps: int = 1_000
    peak_lr: float = 2.5e-5
    decay_steps: int = 30_000
    decay_lr: float = 2.5e-6
    timescale: float = 10_000.0  # of "rsqrt"


@dataclass(frozen=True)
class Optimizer:
    """AdamW after clipping by global norm."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_gradient_norm: float = 1.0


@dataclass(frozen=True)
class StageConfig:
    """What both stages have."""

    num_train_steps: int = 30_000
    batch_size: int = 16  # over all devices of all nodes
    lr_schedule: LrSchedule = field(default_factory=LrSchedule)
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema_decay: float = 0.0  # EMA of the trained parameters for inference; 0 = none
    weight_loader: str = ""  # an openpi checkpoint's `params` (local path or URL); "" = random
    # auto: with a LoRA variant that expert's own weights are frozen; trunk: all of PaliGemma (image tower and first
    # expert) is frozen and only the second expert and the heads train; none: everything trains
    freeze_filter: Literal["auto", "trunk", "none"] = "auto"
    grad_accum_steps: int = 1  # micro-batches that one step scans over; divides batch_size
    remat: Literal["none", "dots", "full"] = (
        "none"  # what the backward pass recomputes: nothing, all but matrix products, all
    )
    augment_images: bool = True
    crop: float = 0.95  # augmentation: side of the random crop, of the image's; wrist cameras are not cropped or turned
    rotation: float = 5.0  # augmentation: degrees at most, either way
    state_noise: float = 0.0  # std of noise on the normalised state in training: against learning poses by heart
    log_interval: int = 100
    val_interval: int = 1_000
    val_batches: int = 4
    save_interval: int = 1_000
    keep_period: int = 5_000  # checkpoints at multiples are kept for ever; of the others the last one
    trace_samples: bool = False  # write the visited sample indices of every step to samples.jsonl


@dataclass(frozen=True)
class ValueConfig(StageConfig):
    """The value stage: V and the levels' Q."""

    num_train_steps: int = 30_001
    data: Literal["optimal", "mixed", "both"] = "optimal"  # the original README trains on the optimal set only
    gamma: float = 0.99  # per step
    target_ema: float = 0.005  # the target network moves by this share each step
    next_images: Literal["true", "current"] = "true"  # images at t+K, or (cheap) those at t with the next state
    exp_clip_log: float = 1.791759469228055  # log(6): gradient clip of "exponential" as IDQL does


@dataclass(frozen=True)
class PolicyConfig(StageConfig):
    """The policy stage: weighted flow matching."""

    run_name: str = "policy"  # its folder below the experiment's
    weighting: Weighting = "hvd"  # none = imitation
    advantage: Literal["q_minus_v", "marginal"] = "q_minus_v"
    beta: float = 3.0  # of "awr"
    weight_clip: float = 100.0
    bc_lambda: float = 1.0  # L = L_RL(suboptimal) + bc_lambda * L_BC(optimal); L_RL has the weights' scale, as alpha^2
    suboptimal_share: float = 0.5  # of each batch; 0 = the optimal set alone, 1 = the suboptimal set alone
    num_flow_steps: int = 10  # Euler steps when acting


@dataclass(frozen=True)
class EvaluateConfig:
    num_rollouts: int = 40
    seed: int = 1_000_000  # rollouts never share a seed with the data
    execute_steps: int = 10  # actions of a chunk that are executed before the next one is computed
    workers: int = 2
    videos: int = 3
    action_samples: int = 8  # held-out action error: also of the mean of so many sampled chunks
    baselines: bool = False  # also train and evaluate imitation on the expert set, the mixed set, successes only
    val_fraction: float = 0.1  # of the episodes of every dataset, held out from training


@dataclass(frozen=True)
class SimConfig:
    """The simulated R1's recordings; task "" = no simulation, the data are the user's."""

    task: Literal["", "tote", "pick"] = ""
    num_optimal: int = 40
    num_mixed: int = 160
    image_size: int = 96
    seed: int = 0
    horizon: int = 200  # control steps of an episode at most, at 10 Hz
    workers: int = 2


@dataclass(frozen=True)
class Experiment:
    """One experiment: two datasets, a value run and one or more policy runs."""

    name: str
    exp_name: str = ""  # folder below runs_dir; "" = name
    robot: str = "r1"
    runs_dir: str = "runs"
    assets_dir: str = "assets"
    seed: int = 0
    fsdp_devices: int = 1  # devices that share one copy of the parameters; 0 = those of a node
    deterministic: bool = False  # bit-equal results on a GPU too, at some cost of speed
    num_workers: int = 4  # decoding threads of a process
    image_cache: bool = False  # decode each video once into a memory-mapped file of model-sized frames
    wandb: bool = False
    accelerator: Literal["gpu", "cpu"] = "gpu"  # what the launcher asks a cluster for
    hang_timeout: float = 1800.0  # seconds without a step after which a run prints all stacks and ends; 0 = never
    model: ModelConfig = field(default_factory=ModelConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    optimal_data: DataConfig = field(default_factory=DataConfig)
    suboptimal_data: DataConfig = field(default_factory=DataConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sim: SimConfig = field(default_factory=SimConfig)

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

    def datasets(self) -> tuple[tuple[str, DataConfig], ...]:
        """("optimal", ...) and ("suboptimal", ...), those that the experiment has."""
        both = (("optimal", self.optimal_data), ("suboptimal", self.suboptimal_data))
        return tuple((role, data) for role, data in both if data.repo_id or data.root)

    def resolved(self) -> "Experiment":
        """The same with the folders of simulated data filled in; call it once after overrides."""
        if not self.sim.task:
            return self
        roots = {"optimal_data": "optimal", "suboptimal_data": "mixed"}
        changed = {}
        for name, folder in roots.items():
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
