"""Where the roles of a test may live: every layout must give the numbers of one rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig, PlacementConfig

ENGINE = EngineConfig(micro_batch_tokens=64)
OFFLOAD = replace(ENGINE, offload_idle=True)
OVERLAP = replace(OFFLOAD, overlap_offload=True)
SHARDED = replace(ENGINE, distributed_optimizer=True)
LATE = replace(SHARDED, overlap_grad_reduce=True, overlap_param_gather=True)
SPLIT = {"actor": "policy", "reference": "policy", "critic": "judges", "reward": "judges"}


@dataclass(frozen=True)
class Layout:
    """A world; ``where``: role -> placement, "all" (every rank under ``parallel``) by default.

    ``float64``: plain-torch models in float64, a whole one on every rank, instead of engines.
    """

    world: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = ENGINE
    placements: dict[str, PlacementConfig] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    float64: bool = False


def split(policy: ParallelConfig, judges: ParallelConfig, at: int, world: int, engine: EngineConfig = ENGINE) -> Layout:
    """Actor and reference on the ranks before ``at``, critic and reward on the others."""
    placements = {
        "policy": PlacementConfig(first_rank=0, num_ranks=at, parallel=policy),
        "judges": PlacementConfig(first_rank=at, num_ranks=world - at, parallel=judges),
    }
    return Layout(world, engine=engine, placements=placements, where=SPLIT)


ONE, TP, TP_SP, PP = (
    ParallelConfig(),
    ParallelConfig(tp=2),
    ParallelConfig(tp=2, sequence_parallel=True),
    ParallelConfig(pp=2),
)
TP_PP, CP = ParallelConfig(tp=2, pp=2), ParallelConfig(cp=2)
LAYOUTS = {
    "one rank": Layout(),
    "small packs": Layout(engine=EngineConfig(micro_batch_tokens=20)),
    "tp2": Layout(2, TP),
    "tp2 sp": Layout(2, TP_SP),
    "pp2": Layout(2, PP),
    "dp2": Layout(2, ONE, SHARDED),
    "cp2": Layout(2, CP),
    "tp2 pp2": Layout(4, TP_PP),
    "overlapping offload": Layout(engine=OVERLAP),
    "split 2 + 2": split(TP, PP, 2, 4),
    "split 2 + 4": split(PP, TP_PP, 2, 6),
}
# the rest of the matrix
MORE_LAYOUTS = {
    "tp2 sp pp2": Layout(4, replace(TP_SP, pp=2)),
    "pp4": Layout(4, ParallelConfig(pp=4)),
    "dp2 tp2": Layout(4, TP, SHARDED),
    "dp2 pp2, small packs": Layout(4, PP, replace(SHARDED, micro_batch_tokens=20)),
    "cp2 pp2": Layout(4, ParallelConfig(cp=2, pp=2)),
    "cp2 tp2": Layout(4, ParallelConfig(cp=2, tp=2)),
    "cp2 tp2 sp": Layout(4, replace(TP_SP, cp=2)),
    "cp2 dp2, small packs": Layout(4, CP, replace(SHARDED, micro_batch_tokens=20)),
    "dp3": Layout(3, ONE),
    "offload": Layout(engine=OFFLOAD),
    "offload, tp2 pp2": Layout(4, TP_PP, OFFLOAD),
    "offload, dp2 late": Layout(2, ONE, replace(LATE, offload_idle=True)),
    "overlapping offload, tp2 pp2": Layout(4, TP_PP, OVERLAP),
    "overlapping offload, dp2 late": Layout(2, ONE, replace(LATE, offload_idle=True, overlap_offload=True)),
    "split 1 + 1": split(ONE, ONE, 1, 2),
    "split 2 + 2, offload": split(TP_SP, CP, 2, 4, OFFLOAD),
    "split 2 + 2, dp2 | tp2": split(ONE, TP, 2, 4, SHARDED),
    "split 2 + 4, offload": split(TP, replace(CP, pp=2), 2, 6, OFFLOAD),
    "split 2 + 4, overlapping offload": split(TP, replace(CP, pp=2), 2, 6, OVERLAP),
    "split 4 + 2": split(TP_PP, ONE, 4, 6, SHARDED),
}
FLOAT64 = {
    "three ranks, small packs": Layout(3, engine=EngineConfig(micro_batch_tokens=13), float64=True),
    "one rank": Layout(float64=True),
    "two ranks": Layout(2, float64=True),
}
