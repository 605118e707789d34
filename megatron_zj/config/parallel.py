"""How ranks are arranged: sizes of the parallel axes, and blocks of ranks (placements)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_zj.config.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes of one placement; data parallelism is what is left over."""

    tp: int = 1  # tensor
    pp: int = 1  # pipeline stages
    vpp: int = 1  # model chunks a stage (interleaved schedule when > 1)
    cp: int = 1  # context
    sequence_parallel: bool = False  # shard activations between tensor-parallel regions; needs tp > 1

    def __post_init__(self) -> None:
        check_ranges(self, **dict.fromkeys(("tp", "pp", "vpp", "cp"), "[1, 1000000]"))
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp={self.vpp} needs pp > 1; set pp or vpp=1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel=true needs tp > 1; set tp or sequence_parallel=false")

    @property
    def model_size(self) -> int:
        """Ranks one replica of the model takes."""
        return self.tp * self.pp * self.cp


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """A block of consecutive global ranks and how they are arranged."""

    first_rank: int = 0  # global rank of its first rank
    num_ranks: int | None = None  # None: all the ranks from first_rank on
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        check_ranges(self, first_rank="[0, inf)", num_ranks="[1, inf)")
