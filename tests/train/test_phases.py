"""Every collective of a run happens in a phase that another rank's report can name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_zj.cli.compose import compose_run
from megatron_zj.cli.train import train
from megatron_zj.runtime.distributed import Process
from tests.helpers.ranks import run_ranks
from tests.train import stages

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor", "barrier"),
    *("broadcast", "broadcast_object_list", "send", "recv", "isend", "irecv", "batch_isend_irecv", "new_group"),
)


def _phases(overrides: list[str]) -> Counter[str]:
    """How many collectives were called in each phase."""
    rank, size = dist.get_rank(), dist.get_world_size()
    process, found = Process(rank, rank, size, torch.device("cpu")), Counter[str]()

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            found[str(process.activity)] += 1
            return original(*arguments, **named)

        return call

    for name in COLLECTIVES:  # in a process of its own, which ends with this function
        call = counted(getattr(dist, name))
        setattr(dist, name, call)
        setattr(dist.distributed_c10d, name, call)  # a batch of messages takes its own isend and irecv alone
    train(compose_run(overrides), process)
    return found


def test_no_collective_is_outside_a_named_phase(tmp_path: Path) -> None:
    stages.make_data(tmp_path)
    overrides = stages.overrides_of("sft", tmp_path, "sft", checkpoint__load="null", run__num_steps=2)
    for found in run_ranks(2, _phases, overrides):
        assert "no phase" not in found
        for phase in ("build", "after step 1 > Measure", "after step 1 > Save > save", "end of the run > Measure"):
            assert found[phase] > 0, phase
        assert any(phase.startswith("step 1 > ") for phase in found)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "ppo", "grpo", "rejection", "dpo"])
def test_no_collective_of_the_other_stages_is_either(tmp_path: Path, stage: str) -> None:
    stages.make_data(tmp_path)
    for earlier in ("pretrain", "sft", "reward"):
        run_ranks(2, stages.run_stage, stages.overrides_of(earlier, tmp_path, earlier, run__num_steps=2))
    for found in run_ranks(2, _phases, stages.overrides_of(stage, tmp_path, f"{stage}_counted", run__num_steps=2)):
        assert "no phase" not in found
