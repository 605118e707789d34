"""One training run twice: by the reference in plain torch, and by an engine on some layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.config.model import HeadKind, ModelConfig, Want
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.engine import Engine
from megatron_zj.engine.objective import LossTerms
from megatron_zj.engine.optimizer_state import whole_tensors
from megatron_zj.models.canonical import _read as read_parameters
from megatron_zj.models.canonical import canonical_tensors, initial_tensor, read_stage, shard
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import ParallelGroups, create_groups
from tests.helpers.reference_llama import ReferenceLlama

HOST = torch.device("cpu")
SEED = 7
STEPS = 5
MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=4,
    num_attention_heads=8,
    num_query_groups=4,
    max_position_embeddings=64,
    init_std=0.15,
)
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.1, clip_grad=0.5, schedule="cosine", warmup_steps=2, decay_steps=8)
LENGTHS = (3, 17, 9, 1, 24, 12, 5, 8)
# A row has one score but many tokens.  The mean of eight scores is so steep (gradient norm 22 at a loss of 1) that one
# weight decides: its first gradient is 1e-9, as little as rounding, and Adam makes a step of it.  See DECISIONS.md.
ROWS: dict[HeadKind, int] = {"lm": 8, "value": 8, "score": 16}
WANTS: dict[HeadKind, Want] = {"lm": "logprobs", "value": "values", "score": "scores"}


@dataclass(frozen=True)
class Case:
    """A layout and an engine."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(micro_batch_tokens=32))
    head: HeadKind = "lm"
    ranks: int = 1
    model: ModelConfig = MODEL
    device: str = "cpu"  # cuda: the rank's own
    reads_some: bool = False  # the objective says which slots it reads

    def name(self) -> str:
        shown = [f"{axis}{getattr(self.parallel, axis)}" for axis in ("tp", "pp", "vpp", "cp")]
        off = EngineConfig()
        flags = [
            f"{name}={getattr(self.engine, name)}"
            for name in EngineConfig.__dataclass_fields__
            if getattr(self.engine, name) != getattr(off, name)
        ]
        sequence = " sp" if self.parallel.sequence_parallel else ""
        some = " reads some" if self.reads_some else ""
        return f"{self.ranks} ranks {' '.join(shown)}{sequence} {self.head} {' '.join(flags)}{some}"


class Squares:
    """-log p, or half the squared distance of a value or score from a target: one objective for every head."""

    temperature = 1.0

    def __init__(self, head: HeadKind) -> None:
        self.wants: tuple[Want, ...] = (WANTS[head],)

    def weight(self, batch: PackedBatch) -> Tensor:
        if self.wants == ("scores",):
            return torch.tensor(batch.num_rows)
        return (batch.per_token["loss_mask"] * batch.targets).sum()

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        (want,) = self.wants
        given = outputs[want]
        if want == "scores":
            return LossTerms(0.5 * (given - batch.per_row["goal"]).square().sum(), {"output": given.detach().sum()})
        mask = batch.per_token["loss_mask"] * batch.targets
        if want == "logprobs":
            return LossTerms(-(given * mask).sum(), {"output": (given.detach() * mask).sum()})
        errors = 0.5 * (given - batch.per_token["goal"]).square()
        return LossTerms((errors * mask).sum(), {"output": (given.detach() * mask).sum()})


class SomeSquares(Squares):
    """The same, and it says so: nothing but what its mask names needs to be computed."""

    def needs(self, batch: PackedBatch) -> Tensor:
        return batch.per_token["loss_mask"]


def global_batch(step: int, model: ModelConfig = MODEL, head: HeadKind = "lm") -> Batch:
    """``ROWS`` rows of unequal lengths; those of length 1 predict nothing."""
    generator = torch.Generator().manual_seed(100 + step)
    lengths = [LENGTHS[(index + step) % len(LENGTHS)] for index in range(ROWS[head])]
    tokens = Rows.of([torch.randint(0, model.vocab_size, (length,), generator=generator) for length in lengths])
    mask = (torch.rand(len(tokens.values), generator=generator) < 0.7).long()
    goal = torch.randn(len(tokens.values), generator=generator)
    goals = torch.randn(len(lengths), generator=generator)
    return Batch(tokens, {"loss_mask": tokens.replace(mask), "goal": tokens.replace(goal)}, {"goal": goals})


@dataclass(frozen=True)
class Record:
    """A reference run."""

    losses: list[float]
    outputs: list[float]
    grad_norms: list[float]
    first_gradients: dict[str, Tensor]  # of step 0, clipped, by canonical name
    weights: dict[str, Tensor]  # after the last step


def initial_weights(model: ModelConfig, head: HeadKind) -> dict[str, Tensor]:
    """Whole tensors by canonical name."""
    return {tensor.name: initial_tensor(tensor, model, SEED) for tensor in canonical_tensors(model, head)}


def _reference_loss(network: ReferenceLlama, head: HeadKind, batch: Batch) -> tuple[Tensor, Tensor, int]:
    rows = batch.tokens.split()
    given = network.outputs(rows, WANTS[head])
    if head == "score":
        return 0.5 * (given - batch.per_row["goal"].to(given)).square().sum(), given.detach().sum(), len(rows)
    mask = batch.per_token["loss_mask"].values.clone()
    mask[batch.tokens.offsets[:-1]] = 0  # nothing predicts a row's first token
    goal = batch.per_token["goal"].values.to(given)
    terms = -given if head == "lm" else 0.5 * (given - goal).square()
    return (terms * mask).sum(), (given.detach() * mask).sum(), int(mask.sum())


@cache
def reference(head: HeadKind = "lm", model: ModelConfig = MODEL) -> Record:
    """Five AdamW steps in one process, a row at a time, in fp64: fp32 would add rounding of its own (8e-7)."""
    network = ReferenceLlama(model, head, dtype=torch.float64, state=initial_weights(model, head))
    decayed = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        foreach=False,
    )
    rates = [0.5, 1.0, 1.0, 0.5 * (1 + 0.75**0.5), 0.75]  # warm-up 2, then cosine over 6: by hand
    losses, outputs, norms, first = [], [], [], {}
    for step in range(STEPS):
        loss, output, weight = _reference_loss(network, head, global_batch(step, model, head))
        adam.zero_grad(set_to_none=True)
        (loss / weight).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIM.clip_grad)))
        first = first or network.gradients()
        for group in adam.param_groups:
            group["lr"] = OPTIM.lr * rates[step]
        adam.step()
        losses.append(float(loss.detach()) / weight)
        outputs.append(float(output) / weight)
    weights = {name: value.detach().clone() for name, value in network.named_parameters()}
    return Record(losses, outputs, norms, first, weights)


def make_groups(case: Case) -> ParallelGroups:
    """The groups of a case, over the whole world."""
    grid = RankGrid.from_config(case.parallel, 0, dist.get_world_size())
    groups = create_groups({"all": grid}, {"all": case.parallel}, 60)["all"]
    assert groups is not None
    return groups


def make_engine(
    case: Case, groups: ParallelGroups | None = None, optim: OptimConfig | None = OPTIM, *, awaits_weights: bool = False
) -> Engine:
    """A fresh engine of a case."""
    groups = groups or make_groups(case)
    device = HOST if case.device == "cpu" else torch.device(case.device, torch.cuda.current_device())
    where = case.engine, optim, 8, device, SEED
    return build_engine(case.model, case.head, groups, *where, awaits_weights=awaits_weights)


def shard_of(batch: Batch, groups: ParallelGroups) -> Batch:
    """This data-parallel shard's contiguous rows."""
    rows = torch.tensor_split(torch.arange(batch.num_rows), groups.dp_size)[groups.dp_rank]
    return batch.select(rows.tolist())


def own_part(whole: dict[str, Tensor], case: Case, groups: ParallelGroups, name: str) -> Tensor:
    """The rank's tp shard of a whole tensor."""
    (tensor,) = [tensor for tensor in canonical_tensors(case.model, case.head) if tensor.name == name]
    return shard(whole[name], tensor.tp_dim, groups.tp_size, groups.tp_rank)


@torch.no_grad()
def first_gradients(engine: Engine) -> dict[str, Tensor]:
    """Clipped gradients of step 0, of every parameter of this rank, whole over data parallelism.

    After one step exp_avg is (1 - beta1) times the gradient, on whatever optimizer.
    """
    assert engine.optimizer is not None
    whole = whole_tensors(engine.optimizer, loading=False, everywhere=True)
    return read_parameters(
        engine.chunks, engine.groups, lambda parameter: whole(parameter)["exp_avg"] / (1 - OPTIM.beta1)
    )


def train(case: Case) -> dict[str, Any]:
    """Five steps by an engine; the differences from the reference, on this rank."""
    groups = make_groups(case)
    engine = make_engine(case, groups)
    truth = reference(case.head, case.model)
    objective = (SomeSquares if case.reads_some else Squares)(case.head)
    history, gradient = [], (0.0, "")
    for step in range(STEPS):
        history.append(engine.update(objective, shard_of(global_batch(step, case.model, case.head), groups)))
        if step == 0:
            found = first_gradients(engine)
            gradient = max(
                ((value.cpu() - own_part(truth.first_gradients, case, groups, name)).abs().max().item(), name)
                for name, value in found.items()
            )
    engine.gather_weights()
    weights = max(
        ((value.cpu() - own_part(truth.weights, case, groups, name)).abs().max().item(), name)
        for name, value in read_stage(engine.chunks, groups).items()
    )
    return {
        "history": history,
        "loss": max(abs(one["loss"] - loss) for one, loss in zip(history, truth.losses, strict=True)),
        "output": max(abs(one["output"] - value) for one, value in zip(history, truth.outputs, strict=True)),
        "grad_norm": max(abs(one["grad_norm"] / norm - 1) for one, norm in zip(history, truth.grad_norms, strict=True)),
        "gradient": gradient,
        "weights": weights,
        "names": sorted(found),
    }


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    """Several cases in one set of ranks."""
    return [train(case) for case in cases]


def with_engine(case: Case, **changes: Any) -> Case:
    """The case with another engine."""
    return replace(case, engine=replace(case.engine, **changes))
