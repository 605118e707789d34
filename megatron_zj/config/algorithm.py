"""What is learned: one dataclass an algorithm, chosen by ``kind``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from megatron_zj.config.health import HealthConfig
from megatron_zj.config.model import HeadKind
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.config.ranges import check_ranges
from megatron_zj.config.sampling import SamplingConfig

Aggregation = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3", "abs"]


@dataclass(frozen=True, kw_only=True)
class RoleKind:
    """What a model of an algorithm is, in every run of it."""

    head: HeadKind = "lm"  # what it ends in
    trains: bool = True  # False: frozen, no optimizer
    start: Literal["checkpoint", "reward", "own"] = "checkpoint"  # of weights: checkpoint.load, reward.load, its load
    needs_weights: bool = True  # random ones are an error


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """One model of an algorithm: where its weights come from, where it lives."""

    load: Path | None = None  # checkpoint whose weights it starts from; None: see the algorithm
    load_role: str | None = None  # the role inside that checkpoint; None: the only one, or the same name
    placement: str = "all"  # a key of placements; "all" is every rank under ``parallel``
    engine: EngineConfig | None = None  # None: the run's ``engine``
    optim: OptimConfig | None = None  # None: the run's ``optim`` (a frozen role has none either way)


LM_FROM_SCRATCH: Mapping[str, RoleKind] = {"model": RoleKind(needs_weights=False)}
POLICY, REFERENCE = RoleKind(), RoleKind(trains=False)
JUDGE = RoleKind(head="score", trains=False, start="own")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What every algorithm that learns from a data set as it stands has."""

    global_batch_size: int = 8  # rows, dialogues or prompts with their ranked answers, an optimizer step

    def __post_init__(self) -> None:
        check_ranges(self, global_batch_size="[1, inf)")

    @property
    def update_size(self) -> tuple[str, int]:
        """The setting that holds the size of an optimizer step, and its value."""
        return "global_batch_size", self.global_batch_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps an algorithm step."""
        return 1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DatasetConfig):
    """Next-token prediction on packed text."""

    role_kinds: ClassVar[Mapping[str, RoleKind]] = LM_FROM_SCRATCH

    kind: Literal["pretrain"] = "pretrain"
    model: RoleConfig = RoleConfig()

    @property
    def data_kind(self) -> str:
        """The data it learns from."""
        return "corpus"


@dataclass(frozen=True, kw_only=True)
class SFTConfig(DatasetConfig):
    """Next-token prediction on the assistant's turns."""

    role_kinds: ClassVar[Mapping[str, RoleKind]] = LM_FROM_SCRATCH

    kind: Literal["sft"] = "sft"
    model: RoleConfig = RoleConfig()

    @property
    def data_kind(self) -> str:
        """The data it learns from."""
        return "chat"


@dataclass(frozen=True, kw_only=True)
class RewardConfig(DatasetConfig):
    """A reward model from ranked answers.

    ``pairs``: all-pairs logistic loss (Ouyang et al. 2022, eq. 1) on the last token's score.  ``plackett_luce``: the
    likelihood of the whole ranking.  ``per_token``: Zhongjing's pair loss on every token from the first that differs.
    """

    role_kinds: ClassVar[Mapping[str, RoleKind]] = {"model": RoleKind(head="score", needs_weights=False)}

    kind: Literal["reward"] = "reward"
    loss: Literal["pairs", "plackett_luce", "per_token"] = "pairs"  # see above
    margin: float = 0.0  # score by which a pair must differ a rank of gap (loss: pairs, per_token)
    centering: float = 0.0  # coefficient of the squared mean score of a group
    model: RoleConfig = RoleConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, margin="[0, inf)", centering="[0, inf)")
        if self.margin and self.loss == "plackett_luce":
            raise ValueError("margin has no meaning for loss plackett_luce, which compares no pairs; set margin: 0")

    @property
    def data_kind(self) -> str:
        """The data it learns from."""
        return "preference"


@dataclass(frozen=True, kw_only=True)
class DPOConfig(DatasetConfig):
    """Direct preference optimization (Rafailov et al. 2023) on ranked answers.

    Where ``load`` is None: actor and reference start from ``checkpoint.load``.
    """

    role_kinds: ClassVar[Mapping[str, RoleKind]] = {"actor": POLICY, "reference": REFERENCE}

    kind: Literal["dpo"] = "dpo"
    beta: float = 0.1  # strength of the tie to the reference
    label_smoothing: float = 0.0  # probability that a ranking is wrong (conservative DPO); 0: none
    pairs: Literal["all", "best_worst"] = "all"  # of a ranked group: every ordered pair, or the best against the worst
    actor: RoleConfig = RoleConfig()
    reference: RoleConfig = RoleConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, beta="(0, inf)", label_smoothing="[0, 0.5)")

    @property
    def data_kind(self) -> str:
        """The data it learns from."""
        return "preference"


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Where a run stops because training and rollout give other log-probabilities to the same tokens (nats).

    Repetition penalty and ``min_new_tokens`` change what is sampled from, so they open a real gap.
    """

    max: float | None = None  # largest difference of any token; None: not checked
    mean: float | None = 0.05  # mean difference; None: not checked
    k3: float | None = None  # k3 estimate of KL(rollout || training), per token; None: not checked

    def __post_init__(self) -> None:
        check_ranges(self, max="(0, inf)", mean="(0, inf)", k3="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """What every algorithm that learns from its own samples has."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts_per_step: int = 32  # prompts drawn an iteration, over all ranks
    samples_per_prompt: int = 1  # responses to each prompt
    epochs: int = 2  # passes over a step's samples
    minibatch_size: int = 16  # samples an optimizer step
    balance_minibatches: bool = False  # deal rows to an epoch's minibatches by length, so that all have like tokens
    whiten_scores: bool = True  # subtract/divide by the reward model's stored mean and deviation
    running_scores: bool = False  # instead: by the mean and deviation of all scores of this run so far
    score_clip: float | None = None  # scaled scores, rules included, count between -/+ this; None: no clip
    rules: dict[str, float] = field(default_factory=dict)  # rule rewards by name (algorithms/rules.py) -> weight
    score_sign: Literal[1, -1] = 1  # -1: maximise the opposite, a control experiment that has to make the policy worse
    missing_eos_penalty: float = 0.0  # subtracted from the score of a truncated answer
    length_penalty: float = 0.0  # subtracted from the score for each token beyond length_free
    length_free: int = 0  # tokens of an answer that cost nothing
    parity: ParityConfig = ParityConfig()
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        at_least_one = dict.fromkeys(("prompts_per_step", "samples_per_prompt", "epochs", "minibatch_size"), "[1, inf)")
        at_least_none = dict.fromkeys(("missing_eos_penalty", "length_penalty", "length_free"), "[0, inf)")
        check_ranges(self, **at_least_one, **at_least_none, score_clip="(0, inf)")

    @property
    def data_kind(self) -> str:
        """The data it learns from."""
        return "prompts"

    @property
    def num_samples(self) -> int:
        """Samples an iteration."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def update_size(self) -> tuple[str, int]:
        """The setting that holds the samples of an optimizer step, and its value."""
        return "minibatch_size", self.minibatch_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps an algorithm step."""
        return self.epochs * (self.num_samples // self.minibatch_size)


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(OnPolicyConfig):
    """The clipped surrogate and the tie to the reference, as PPO and GRPO share them."""

    kl_coef: float = 0.05  # weight of the KL term, per token
    kl_estimator: KLEstimator = "k1"  # of the KL to the reference, per token (Schulman 2020)
    kl_target: float | None = None  # mean sequence KL (nats): the adaptive controller's, and the health check's
    clip_ratio: float = 0.2  # the probability ratio counts down to 1 minus this
    clip_high: float | None = None  # and up to 1 plus this (clip-higher, Yu et al. 2025); None: as clip_ratio
    dual_clip: float | None = None  # most that a negative advantage costs, in advantages (Ye et al. 2020); None: off
    entropy_coef: float = 0.0  # weight of the entropy bonus; 0: none
    aggregation: Aggregation = "token"  # mean over tokens, or over sequences of their token means
    importance_cap: float | None = None  # weight tokens by the training/rollout ratio, at most this; None: off
    early_stop_kl: float | None = None  # skip an iteration's further policy updates above this approx_kl; None: never
    recompute_logprobs: bool = True  # old log-probabilities by the training pass; False: those of sampling (no parity)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples % self.minibatch_size:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} must divide prompts_per_step x samples_per_prompt = "
                f"{self.num_samples}"
            )
        check_ranges(
            self,
            kl_coef="[0, inf)",
            kl_target="(0, inf)",
            clip_ratio="(0, 1]",
            clip_high="(0, inf)",
            dual_clip="(1, inf)",
            entropy_coef="[0, inf)",
            importance_cap="(0, inf)",
            early_stop_kl="(0, inf)",
        )
        if self.importance_cap is not None and not self.recompute_logprobs:
            raise ValueError("importance_cap compares training with rollout: it needs recompute_logprobs: true")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyGradientConfig):
    """Proximal policy optimization (Schulman et al. 2017) with a KL term in the reward (Ouyang et al. 2022).

    Where ``load`` is None: actor and reference start from ``checkpoint.load``, critic from the reward model.
    """

    role_kinds: ClassVar[Mapping[str, RoleKind]] = {
        "actor": POLICY,
        "critic": RoleKind(head="value", start="reward"),
        "reference": REFERENCE,
        "reward": JUDGE,
    }

    kind: Literal["ppo"] = "ppo"
    actor: RoleConfig = RoleConfig()
    critic: RoleConfig = RoleConfig()
    reference: RoleConfig = RoleConfig()
    reward: RoleConfig = RoleConfig()
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # GAE's lambda (Schulman et al. 2016)
    kl_in: Literal["reward", "loss"] = "reward"  # where the KL term stands
    kl_controller: Literal["fixed", "adaptive"] = "fixed"  # of kl_coef; adaptive: Ziegler et al. 2019
    kl_horizon: int = 10000  # samples over which the adaptive controller acts
    clip_value: float | None = 0.2  # a new value counts within this of the old one; None: no clip
    whiten_advantages: bool = True  # over the iteration's response tokens
    critic_warmup_steps: int = 0  # iterations at the start in which only the critic learns

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            gamma="[0, 1]",
            lam="[0, 1]",
            kl_horizon="[1, inf)",
            clip_value="(0, inf)",
            critic_warmup_steps="[0, inf)",
        )
        if self.kl_controller == "adaptive" and self.kl_target is None:
            raise ValueError("kl_controller adaptive needs kl_target (nats a sequence)")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_in loss with kl_estimator k1 does nothing: the expected gradient of log pi - log pi_ref is 0; "
                "take k2 or k3"
            )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PolicyGradientConfig):
    """Group relative policy optimization (Shao et al. 2024): the baseline is the group's mean, there is no critic.

    Where ``load`` is None: actor and reference start from ``checkpoint.load``.
    """

    role_kinds: ClassVar[Mapping[str, RoleKind]] = {"actor": POLICY, "reference": REFERENCE, "reward": JUDGE}

    kind: Literal["grpo"] = "grpo"
    actor: RoleConfig = RoleConfig()
    reference: RoleConfig = RoleConfig()
    reward: RoleConfig = RoleConfig()
    samples_per_prompt: int = 4  # the group
    kl_estimator: KLEstimator = "k3"  # in the loss
    scale_advantages: bool = True  # divide by the group's deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt must be >= 2, got {self.samples_per_prompt}: a group of one is 0")
        if self.kl_coef and self.kl_estimator == "k1":
            raise ValueError("kl_estimator k1 has no expected gradient in a loss; take k2 or k3")


_FILTER_USES = frozenset({"kind", "actor", "reward", "source", "keep", "minibatch_size", "prompts_per_step"})


@dataclass(frozen=True, kw_only=True)
class RejectionConfig(OnPolicyConfig):
    """Rejection sampling: SFT on what the reward model likes best (ChiMed-GPT).

    ``sample``, as its paper says: every iteration draws N answers a prompt from the current model and learns the best.
    ``filter``, as its code does: scores existing dialogues once (``prompts_per_step`` at a time), by the reward model's
    raw score, keeps the best ``keep`` of all, and learns those.  A setting that this has no use for is an error.
    Where ``load`` is None: the actor starts from ``checkpoint.load``.
    """

    role_kinds: ClassVar[Mapping[str, RoleKind]] = {"actor": POLICY, "reward": JUDGE}

    kind: Literal["rejection"] = "rejection"
    actor: RoleConfig = RoleConfig()
    reward: RoleConfig = RoleConfig()
    source: Literal["sample", "filter"] = "sample"  # see above
    samples_per_prompt: int = 4  # N (source: sample)
    keep: int = 1000  # dialogues kept (source: filter)
    epochs: int = 1  # passes over what was kept (source: sample)
    minibatch_size: int = 16  # kept rows an optimizer step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "sample" and self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt must be >= 2, got {self.samples_per_prompt}: there is no choice")
        if self.source == "sample" and self.prompts_per_step % self.minibatch_size:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} must divide prompts_per_step {self.prompts_per_step}: "
                "one answer a prompt is kept"
            )
        check_ranges(self, keep="[1, inf)")
        for one in fields(self) if self.source == "filter" else ():
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if one.name not in _FILTER_USES and getattr(self, one.name) != default:
                raise ValueError(f"source: filter does not use {one.name}; leave it out")

    @property
    def data_kind(self) -> str:
        """The data it learns from."""
        return "prompts" if self.source == "sample" else "chat"

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps an algorithm step."""
        return self.epochs * (self.prompts_per_step // self.minibatch_size) if self.source == "sample" else 1


AlgorithmConfig = PretrainConfig | SFTConfig | RewardConfig | PPOConfig | DPOConfig | GRPOConfig | RejectionConfig
