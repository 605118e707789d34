"""What follows from a configuration: which models it has, the ranks they live on, and its totals.  Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_zj.config.algorithm import OnPolicyConfig, RoleConfig
from megatron_zj.config.data import CorpusConfig
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig, PlacementConfig
from megatron_zj.config.run import RunConfig
from megatron_zj.config.sampling import SamplingConfig

ALL = "all"  # the placement that is every rank, laid out by RunConfig.parallel
FP8_MULTIPLE = 16  # every size of an FP8 product, see fp8_misfits


@dataclass(frozen=True, kw_only=True)
class Block:
    """A placement with its numbers filled in: ranks ``first_rank`` to ``first_rank + num_ranks - 1``."""

    name: str
    key: str  # where its layout is configured
    first_rank: int
    num_ranks: int
    parallel: ParallelConfig
    roles: tuple[str, ...]  # the models that live on it

    @property
    def dp(self) -> int:
        """Data-parallel size: replicas of the model on this block (0: the layout does not fit)."""
        return self.num_ranks // self.parallel.model_size


def roles(config: RunConfig) -> dict[str, RoleConfig]:
    """The models of the run by role name."""
    found = {name: getattr(config.algorithm, name) for name in config.algorithm.role_kinds}
    wrong = [name for name, role in found.items() if not isinstance(role, RoleConfig)]
    if wrong:
        raise TypeError(f"algorithm.{wrong[0]} is not a role")
    return found


def placements(config: RunConfig, world_size: int | None = None) -> list[Block]:
    """The blocks of ranks that roles live on, in rank order.

    Blocks that no role names are left out, and so are names that are not configured (``checks`` reports both).
    ``world_size``: None takes the configuration's, else 1.
    """
    world = world_size or config.world_size or 1
    known = {**config.placements, ALL: PlacementConfig(parallel=config.parallel)}
    living: dict[str, list[str]] = {}
    for name, role in roles(config).items():
        living.setdefault(role.placement, []).append(name)
    blocks = [
        Block(
            name=name,
            key="parallel" if name == ALL else f"placements.{name}.parallel",
            first_rank=known[name].first_rank,
            num_ranks=_num_ranks(known[name], world),
            parallel=known[name].parallel,
            roles=tuple(names),
        )
        for name, names in living.items()
        if name in known
    ]
    return sorted(blocks, key=lambda block: (block.first_rank, block.name))


def _num_ranks(placement: PlacementConfig, world: int) -> int:
    return world - placement.first_rank if placement.num_ranks is None else placement.num_ranks


def misfits(model: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
    """The axes that do not divide the model's sizes: the axis, and what is wrong and what to change."""
    tp, stages = parallel.tp, parallel.pp * parallel.vpp
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.kv_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "padded_vocab_size": model.padded_vocab_size,
    }
    if model.kv_heads == model.num_attention_heads:
        del sizes["num_query_groups"]
    raised = {"ffn_hidden_size": "ffn_hidden_size", "padded_vocab_size": "vocab_multiple"}
    for name, size in sizes.items():
        if size % tp:
            divisors = ", ".join(str(divisor) for divisor in range(1, tp) if size % divisor == 0)
            other = f", or make model.{raised[name]} a multiple of {tp}" if name in raised else ""
            yield "tp", f"model.{name} = {size} is not divisible by tp = {tp}; use a tp of {divisors}{other}"
    if model.num_layers % stages:
        yield (
            "pp",
            (
                f"model.num_layers = {model.num_layers} is not divisible by pp x vpp = {stages}; "
                "change pp, vpp or model.num_layers"
            ),
        )


def fp8_misfits(model: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
    """A rank's sizes that FP8 products do not take: the setting, and what is wrong and what to change.

    Transformer Engine (``assert_dim_for_fp8_exec``) demands a last dimension that is a multiple of 16 and others of 8
    forward; the backward products read the same operands transposed, so it is 16 for both.  A layer's four products are
    in FP8; embedding, output layer and scalar heads are not, so a vocabulary may have any size.
    """
    if model.fp8 == "none":
        return
    heads, tp, hidden, ffn = model.num_attention_heads, parallel.tp, model.hidden_size, model.ffn_hidden_size
    queries, qkv = heads * model.head_size, (heads + 2 * model.kv_heads) * model.head_size
    both = f"{queries} columns of queries and {qkv} of queries, keys and values are not both multiples"
    settings = (  # the setting, the sizes it makes, what to say of them, whether tp cuts them, what would fit
        ("hidden_size", (hidden,), f"{hidden} is not a multiple", False, FP8_MULTIPLE),
        ("ffn_hidden_size", (ffn,), f"{ffn} is not a multiple", True, FP8_MULTIPLE * tp),
        ("head_dim", (queries, qkv), both, True, FP8_MULTIPLE),
    )
    for name, sizes, wrong, is_cut, multiple in settings:
        fitting = [ranks for ranks in range(1, tp + 1) if _fp8_takes(sizes, ranks if is_cut else 1)]
        if tp in fitting:
            continue
        where = f" on each of tp = {tp} ranks" if is_cut and tp > 1 else ""
        fewer = ", ".join(str(ranks) for ranks in fitting if heads % ranks == 0 and model.kv_heads % ranks == 0)
        yield (
            f"model.{name}",
            f"{wrong} of {FP8_MULTIPLE}{where}, which FP8 products need; make model.{name} a multiple of {multiple}, "
            f"{f'use a tp of {fewer}, ' if fewer else ''}or set model.fp8=none",
        )


def _fp8_takes(sizes: tuple[int, ...], ranks: int) -> bool:
    return all(size % (FP8_MULTIPLE * ranks) == 0 for size in sizes)


def head_of(config: RunConfig, role: str) -> HeadKind:
    """What the role's model ends in."""
    return config.algorithm.role_kinds[role].head


def is_trained(config: RunConfig, role: str) -> bool:
    """False for a frozen role, which has no optimizer."""
    return config.algorithm.role_kinds[role].trains


def starting_point(config: RunConfig, role: str) -> Path | None:
    """Where a role's first weights are: its own ``load``, or what its kind says; None: nobody has named them."""
    known = roles(config)
    own, start = known[role].load, config.algorithm.role_kinds[role].start
    if own is not None or start == "own":
        return own
    return known["reward"].load if start == "reward" else config.checkpoint.load


def starting_key(config: RunConfig, role: str) -> str:
    """The setting that ``starting_point`` comes from, or would come from."""
    start = config.algorithm.role_kinds[role].start
    if roles(config)[role].load is not None or start == "own":
        return f"algorithm.{role}.load"
    return "algorithm.reward.load" if start == "reward" else "checkpoint.load"


def sampling_of(config: RunConfig) -> SamplingConfig | None:
    """How the run draws samples; None: it draws none."""
    algorithm = config.algorithm
    return algorithm.sampling if isinstance(algorithm, OnPolicyConfig) and algorithm.data_kind == "prompts" else None


def engine_of(config: RunConfig, role: RoleConfig) -> EngineConfig:
    """The engine settings of a role: its own, or the run's."""
    return role.engine or config.engine


def longest_row(config: RunConfig) -> int:
    """Tokens of the longest sequence the model will meet."""
    data = config.data
    length = data.sequence_length if isinstance(data, CorpusConfig) else data.max_length
    sampling = sampling_of(config)
    return length + (sampling.max_new_tokens if sampling else 0)


def rows_per_update(config: RunConfig) -> tuple[str, int]:
    """The key and the number of units (rows, ranked groups, samples) of one optimizer step."""
    name, size = config.algorithm.update_size
    return f"algorithm.{name}", size


def optimizer_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run, one model's."""
    return config.run.num_steps * config.algorithm.updates_per_step
