"""Run a model on a layout with megatron-core's own schedule and DDP, and compare it with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.config.model import HeadKind, ModelConfig, Want
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch, pack, padded_length, unpack
from megatron_zj.models.canonical import canonical_tensors, read_stage_grads, shard, write_stage
from megatron_zj.models.llama import LlamaStage, build_stages
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import ParallelGroups, create_groups
from tests.helpers.reference_llama import ReferenceLlama

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # isort: skip

WANTS: dict[HeadKind, tuple[Want, ...]] = {"lm": ("logprobs", "entropy"), "value": ("values",), "score": ("scores",)}
LENGTHS = (13, 1, 30, 8, 21, 2)  # tokens of the rows, dealt to two micro-batches
TINY = ModelConfig(
    vocab_size=90,  # 128 rows, 38 of them padding
    vocab_multiple=64,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=4,
    num_attention_heads=4,
    num_query_groups=2,
    max_position_embeddings=64,
)


ONE_RANK = ParallelConfig()
PLAIN = EngineConfig()


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    name: str
    parallel: ParallelConfig = ONE_RANK
    model: ModelConfig = TINY
    head: HeadKind = "lm"
    engine: EngineConfig = PLAIN
    temperature: float = 1.0


@dataclass
class Outcome:
    """What a layout gave on this rank, as largest absolute differences to the reference."""

    outputs: float | None  # None: not on the last stage
    gradients: dict[str, float] = field(default_factory=dict)


def make_groups(parallel: ParallelConfig, world: int) -> ParallelGroups:
    """Groups of one placement over the whole world."""
    groups = create_groups({"all": RankGrid.from_config(parallel, 0, world)}, {"all": parallel}, 60)["all"]
    assert groups is not None
    return groups


def make_rows(model: ModelConfig, lengths: Sequence[int] = LENGTHS, seed: int = 5) -> list[Tensor]:
    """Random rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, model.vocab_size, (length,), generator=generator) for length in lengths]


def make_packs(rows: Sequence[Tensor], groups: ParallelGroups) -> list[PackedBatch]:
    """Two micro-batches of one padded length, as a pipeline needs."""
    batch = Batch(Rows.of(list(rows)))
    halves = [list(range(0, len(rows), 2)), list(range(1, len(rows), 2))]
    unit = 2 * groups.cp_size * groups.tp_size
    longest = max(padded_length([len(rows[row]) for row in half], groups.cp_size) for half in halves)
    length = -(-longest // unit) * unit
    return [pack(batch, half, cp=groups.cp_size, cp_rank=groups.cp_rank, length=length) for half in halves]


def coefficients(row: int, want: Want, length: int) -> Tensor:
    """Fixed random weights of a row's outputs in the loss, so that no two tokens count alike."""
    return torch.randn(length, generator=torch.Generator().manual_seed(1000 * row + len(want)))


def packed_loss(outputs: dict[Want, Tensor], packed: PackedBatch, groups: ParallelGroups) -> Any:
    """Weighted sum of this rank's share of the outputs, with its integer weight: what an objective returns."""
    loss = torch.zeros(())
    for want, values in outputs.items():
        if want == "scores":
            once = float(groups.cp_rank == 0)  # every cp rank has the same scores
            weights = torch.stack([coefficients(row, want, 1)[0] for row in packed.row_ids])
            loss = loss + once * (weights * values).sum()
            continue
        whole = torch.zeros(packed.cu_seqlens_list[-1])
        for row, start, length in zip(packed.row_ids, packed.cu_seqlens_list, packed.lengths, strict=False):
            whole[start : start + length - 1] = coefficients(row, want, length)[1:]
        loss = loss + (whole[packed.slots] * values).sum()
    share = packed.targets.sum() if "scores" not in outputs else torch.tensor(packed.num_rows * (groups.cp_rank == 0))
    return loss, share.to(torch.int64), {"outputs": {want: value.detach() for want, value in outputs.items()}}


def reference_run(case: Case, reference: ReferenceLlama, rows: Sequence[Tensor]) -> dict[Want, list[Tensor]]:
    """Outputs of every row alone; leaves the gradients of the same loss in the reference."""
    outputs: dict[Want, list[Tensor]] = {want: [] for want in WANTS[case.head]}
    loss, weight = torch.zeros(()), 0
    for index, row in enumerate(rows):
        for want in outputs:
            value = reference.outputs([row], want, case.temperature)
            outputs[want].append(value.detach())
            loss = loss + (coefficients(index, want, value.shape[0]) * value).sum()
        weight += 1 if case.head == "score" else len(row) - 1
    (loss / weight).backward()
    return outputs


def train_step(
    chunks: list[LlamaStage],
    groups: ParallelGroups,
    packs: list[PackedBatch],
    wants: tuple[Want, ...],
    temperature: float,
) -> list[dict[Want, Tensor]]:
    """Forward, backward and gradient reduction of megatron-core; the outputs of each micro-batch (last stage)."""
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk, pg_collection=groups.pgc) for chunk in chunks]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.pgc)

    def step(data: Iterator[PackedBatch], model: Any) -> tuple[Any, Callable[[Any], Any]]:
        packed = next(data)
        return model(packed, wants, temperature), lambda outputs: packed_loss(outputs, packed, groups)

    schedule = get_forward_backward_func(
        pp_size=groups.pp_size, vp_size=groups.vpp_size if groups.vpp_size > 1 else None
    )
    several = len(wrapped) > 1
    results = schedule(
        forward_step_func=step,
        data_iterator=[iter(packs) for _ in wrapped] if several else iter(packs),
        model=wrapped if several else wrapped[0],
        num_microbatches=len(packs),
        seq_length=packs[0].cu_seqlens_list[-1],
        micro_batch_size=1,
        forward_only=False,
        p2p_communicator=P2PCommunicator(groups.pgc.pp, config) if groups.pp_size > 1 else None,
        pg_collection=groups.pgc,
    )
    return [result["outputs"] for result in results]


def gather_context(values: Tensor, packed: PackedBatch, groups: ParallelGroups) -> Tensor:
    """[T] of every cp rank into the whole pack."""
    if groups.cp_size == 1:
        return values
    pieces = [torch.empty_like(values) for _ in range(groups.cp_size)]
    slots = [torch.empty_like(packed.slots) for _ in range(groups.cp_size)]
    dist.all_gather(pieces, values.contiguous(), group=groups.pgc.cp)
    dist.all_gather(slots, packed.slots, group=groups.pgc.cp)
    whole = values.new_zeros(packed.cu_seqlens_list[-1])
    whole[torch.cat(slots)] = torch.cat(pieces)
    return whole


def compare(case: Case, world: int) -> Outcome:
    """Build, run one step, compare; collective over the world."""
    groups = make_groups(case.parallel, world)
    reference = ReferenceLlama(case.model, case.head, seed=3, spread=5.0)
    state = reference.state_dict()
    chunks = build_stages(case.model, case.head, groups, case.engine, "cpu", 0)
    write_stage(chunks, groups, lambda name: state[name])
    rows = make_rows(case.model)
    packs = make_packs(rows, groups)
    # With data parallelism every shard takes the same rows: sums and weights both double.
    found = train_step(chunks, groups, packs, WANTS[case.head], case.temperature)
    expected = reference_run(case, reference, rows)
    outcome = Outcome(None)
    if groups.is_last_stage:
        outcome.outputs = max(
            difference(output, packed, groups, expected) for output, packed in zip(found, packs, strict=True)
        )
    gradients = reference.gradients()
    tp_dims = {tensor.name: tensor.tp_dim for tensor in canonical_tensors(case.model, case.head)}
    for name, gradient in read_stage_grads(chunks, groups).items():
        mine = shard(gradients[name], tp_dims[name], groups.tp_size, groups.tp_rank)
        scale = gradients[name].abs().max().clamp(min=1e-30)
        outcome.gradients[name] = float((gradient - mine).abs().max() / scale)
    return outcome


def difference(
    output: dict[Want, Tensor], packed: PackedBatch, groups: ParallelGroups, expected: dict[Want, list[Tensor]]
) -> float:
    """Largest absolute difference of one micro-batch's outputs to the reference."""
    worst = 0.0
    for want, values in output.items():
        if want == "scores":
            given, wanted = values, torch.cat([expected[want][row] for row in packed.row_ids])
        else:
            given = unpack(gather_context(values, packed, groups), packed).values
            wanted = torch.cat([expected[want][row] for row in packed.row_ids])
        worst = max(worst, float((given - wanted).abs().max()))
    return worst


def heads_of(case: Case) -> list[Case]:
    """The case with each head."""
    return [replace(case, name=f"{case.name} {head}", head=head) for head in WANTS]


def run_cases(cases: Sequence[Case], world: int) -> dict[str, Outcome]:
    """All cases in one world, one after the other; an error names the case."""
    outcomes = {}
    for case in cases:
        try:
            outcomes[case.name] = compare(case, world)
        except Exception as error:
            raise RuntimeError(f"case {case.name!r}") from error
    return outcomes
