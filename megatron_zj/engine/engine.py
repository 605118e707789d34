"""One model on one placement: forward passes, optimizer steps and state.  Knows no algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch.nn import Module

from megatron_zj.config.model import HeadKind, ModelConfig, Want
from megatron_zj.config.optim import EngineConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine import optimizer_state
from megatron_zj.engine.microbatches import MicroBatches, rows_from_packs, scores_from_packs, split, whole_over_cp
from megatron_zj.engine.objective import Comparing, LossTerms, Metrics, Objective, Rowwise
from megatron_zj.engine.offload import HostCopy
from megatron_zj.engine.optimizer import Optimizer
from megatron_zj.engine.reads import Asked, asked_by, asked_for, narrowed
from megatron_zj.engine.totals import MicroBatchSums, nonfinite, require_finite, total
from megatron_zj.parallel.groups import ParallelGroups, placement_world
from megatron_zj.runtime.seed import keyed_seed

_FORMAT = "distrib_optim_sharding_type"


class Engine:
    """Model chunks, pipeline schedule and optimizer on one placement.

    Every method is collective over the placement, with this data-parallel shard's rows, the same on the shard's
    tp, pp and cp ranks.  ``chunks``: the unwrapped stages of this rank.  ``optimizer`` None: a frozen model.
    """

    def __init__(
        self,
        model: ModelConfig,
        head: HeadKind,
        groups: ParallelGroups,
        config: EngineConfig,
        chunks: list[Module],
        wrapped: list[DistributedDataParallel],
        optimizer: Optimizer | None,
        device: torch.device,
        seed: int,
    ) -> None:
        self.model, self.head, self.groups, self.config = model, head, groups, config
        self.chunks: list[Any] = list(chunks)
        self.optimizer, self.device, self.seed = optimizer, device, seed
        self.num_updates = 0  # calls of update that ended, skipped ones included
        self._wrapped = wrapped
        self._p2p = P2PCommunicator(groups.pgc.pp, self.chunks[0].config) if groups.pp_size > 1 else None
        self._schedule = get_forward_backward_func(
            pp_size=groups.pp_size, vp_size=groups.vpp_size if groups.vpp_size > 1 else None
        )
        self._gathers_late = config.overlap_param_gather and optimizer is not None
        self._host = HostCopy()

    @property
    def trainable(self) -> bool:
        """Whether there is an optimizer."""
        return self.optimizer is not None

    # Forward only -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def infer(
        self, wants: tuple[Want, ...], batch: Batch, temperature: float = 1.0, at: str | None = None
    ) -> dict[Want, Rows | Tensor] | None:
        """What the head gives, in the batch's row order, on the last stage's ranks; None on other stages.

        Per-token wants: token-aligned Rows, whole over tp and cp.  Scores: [R].  Values on the engine's device.
        ``at``: a per-token field of the batch; where it is 0 nothing is computed that can be spared, and a
        log-probability or an entropy is 0, a value anything.
        """
        if at is not None and at not in batch.per_token:
            raise ValueError(f"the rows have no per-token field {at!r}; theirs: {', '.join(sorted(batch.per_token))}")
        micro = self._split(batch, asked_for(wants, at))

        def forward_step(packs: Iterator[PackedBatch], stage: Module) -> tuple[Any, Any]:
            outputs = stage(next(packs), wants, temperature)
            return outputs, lambda found, non_loss_data: found

        with _Reading(self):
            outputs = self._run(forward_step, micro, forward_only=True, collect=True)
        if not self.groups.is_last_stage:
            return None
        results: dict[Want, Rows | Tensor] = {}
        for want in wants:
            parts = [one[want] for one in outputs]
            results[want] = (
                scores_from_packs(parts, micro) if want == "scores" else rows_from_packs(parts, micro, self.groups)
            )
        return results

    @torch.no_grad()
    def evaluate(self, objective: Objective, batch: Batch) -> Metrics:
        """The objective without a step: "loss", its metrics (both by the global weight) and "weight"."""
        micro = self._split(batch, asked_by(objective))
        with _Reading(self):
            sums = self._run(self._loss_step(objective, micro), micro, forward_only=True)
        return total(sums, self.groups, self.device).averages()

    def _split(self, batch: Batch, asked: Asked | None) -> MicroBatches:
        fp8 = self.model.fp8 != "none"
        micro = split(batch.to(self.device), self.groups, self.config.micro_batch_tokens, fp8=fp8)
        return narrowed(micro, asked) if self.groups.is_last_stage else micro

    # Training ---------------------------------------------------------------------------------------------------

    def update(self, objective: Objective, batch: Batch) -> Metrics:
        """One optimizer step on the global batch; the same floats on every rank of the placement.

        "loss" and the objective's metrics by the global weight, "grad_norm" (before the clip), "lr", "weight",
        "skipped" (1.0 where an fp16 overflow, or with ``check_for_nan`` off a NaN or Inf, made this step none),
        "loss_scale".  Raises NonFiniteError on a NaN or Inf loss or gradient, ValueError on a batch of weight zero:
        on all ranks, before any weight is touched.
        """
        if self.optimizer is None:
            raise ValueError("this engine is frozen: it was built without an optimizer")
        micro = self._split(batch, asked_by(objective))
        self.reload()
        self._seed_dropout()
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._train_mode(True)
        sums = self._run(self._loss_step(objective, micro), micro, forward_only=False)
        result = total(sums, self.groups, self.device)
        averages = result.averages()
        if isinstance(objective, Comparing) and objective.differences_only:
            self._hold_bias()
        if self.config.check_for_nan:
            require_finite(result, sums, micro, batch, self.groups)
        loss_scale = self.optimizer.loss_scale
        try:
            report = self.optimizer.step(self.config.check_for_nan)
        except FloatingPointError as error:
            what = f"{error} although the loss is {averages['loss']:.6g}"
            raise nonfinite(what, (), range(batch.num_rows), batch, self.groups) from None
        self.num_updates += 1
        return {
            **averages,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "skipped": float(report.skipped),
            "loss_scale": loss_scale,
        }

    def _loss_step(self, objective: Objective, micro: MicroBatches) -> Any:
        """Megatron-core's forward step: the stage's output, and a function from it to (loss, weight, sums)."""
        whole_rows = isinstance(objective, Rowwise) and objective.whole_rows and self.groups.cp_size > 1
        # Scores, and whole rows, are the same on every cp rank: the first one counts them.
        share = 0 if (whole_rows or "scores" in objective.wants) and self.groups.cp_rank > 0 else 1

        def forward_step(packs: Iterator[PackedBatch], stage: Module) -> tuple[Any, Any]:
            packed = next(packs)

            def loss_of(outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, MicroBatchSums]:
                seen = packed
                if whole_rows:
                    seen, outputs = micro.whole(packed, self.groups), self._whole(outputs, packed)
                terms = objective(outputs, seen)
                weight = objective.weight(seen)
                sums = MicroBatchSums.of(terms, weight, share)
                loss = _connected(terms, outputs) * share
                return loss, sums.weight.to(loss.device, torch.int64), sums

            return stage(packed, objective.wants, objective.temperature), loss_of

        return forward_step

    def _whole(self, outputs: dict[str, Tensor], packed: PackedBatch) -> dict[str, Tensor]:
        """Per-token outputs of the whole pack; scores are so already."""
        return {
            want: given if want == "scores" else whole_over_cp([given], [packed], self.groups)[0]
            for want, given in outputs.items()
        }

    def _run(self, forward_step: Any, micro: MicroBatches, *, forward_only: bool, collect: bool = False) -> list[Any]:
        """Megatron-core's pipeline schedule over the micro-batches; one result each on the last stage."""
        chunks: list[Any] = list(self._wrapped) if self._wrapped and not forward_only else list(self.chunks)
        iterators = [iter(micro.packs) for _ in chunks]
        single = self.groups.vpp_size == 1
        results: list[Any] = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=chunks[0] if single else chunks,
            num_microbatches=len(micro.packs),
            seq_length=micro.length,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect,
            p2p_communicator=self._p2p,
            pg_collection=self.groups.pgc,
        )
        return results

    # State ------------------------------------------------------------------------------------------------------

    def sharded_state(self, *, optimizer: bool, loading: bool) -> dict[str, Any]:
        """The state for megatron-core's distributed checkpoints; loads under any other layout.

        ``optimizer``: moments, main weights, schedule and loss scale too.  ``loading``: the shapes to load into.
        """
        self.gather_weights()
        with placement_world(self.groups):
            state = {
                _chunk_key(index, len(self.chunks)): chunk.sharded_state_dict(metadata=self._metadata())
                for index, chunk in enumerate(self.chunks)
            }
            if optimizer and self.optimizer is not None:
                tensors = optimizer_state.sharded_tensors(self.optimizer, self.chunks, state, loading)
                if tensors:  # an empty dict on some ranks would look like unequal unsharded state to megatron-core
                    state["optimizer"] = tensors
                if not loading:
                    state["training"] = self._training_state()
        return state

    def load_sharded_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``sharded_state(loading=True)`` asked for, filled in.

        Raises ValueError where a parameter of an engine that awaits its weights got none.
        """
        self.reload()
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[_chunk_key(index, len(self.chunks))])
            if missing := [name for name, parameter in chunk.named_parameters() if parameter.isnan().any()]:
                raise ValueError(f"no weights were loaded for {', '.join(missing)}")
        if self.optimizer is None:
            return
        if "optimizer" not in state:
            self.optimizer.reload_main_weights()
            return
        # Not so here: the loaded main weights may be the live ones, filled in place, and finer than the model's.
        self._load_training_state(state["training"])
        optimizer_state.load_tensors(self.optimizer, self.chunks, state["optimizer"], self.optimizer.steps)

    def gather_weights(self) -> None:
        """Make the weights whole; needed before the chunks are used other than by this engine's own methods.

        Only with ``overlap_param_gather`` is there anything to do: an update then leaves each data-parallel rank
        with the part it owns, and the next forward pass gathers the rest.
        """
        self.reload()
        if self._gathers_late:
            for chunk in self._wrapped:
                chunk.start_param_sync(force_sync=True)

    def _metadata(self) -> dict[str, Any]:
        """A fresh dict: megatron-core writes into it."""
        return {"dp_cp_group": self.groups.pgc.dp_cp, _FORMAT: "fully_reshardable"}

    def _training_state(self) -> dict[str, Any]:
        assert self.optimizer is not None
        scaler = getattr(self.optimizer.inner, "grad_scaler", None)
        saved = scaler.state_dict() if scaler is not None else {}
        return {
            "steps": self.optimizer.steps,
            "num_updates": self.num_updates,
            "loss_scale": {name: float(value) for name, value in saved.items()},
        }

    def _load_training_state(self, saved: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        self.optimizer.steps, self.num_updates = int(saved["steps"]), int(saved["num_updates"])
        scaler = getattr(self.optimizer.inner, "grad_scaler", None)
        if scaler is not None and saved["loss_scale"]:
            scale = torch.tensor([saved["loss_scale"]["scale"]], dtype=torch.float32, device=self.device)
            counters = {name: int(value) for name, value in saved["loss_scale"].items() if name != "scale"}
            scaler.load_state_dict({"scale": scale, **counters})

    def offload(self, *, beside: bool = False) -> None:
        """Free the device memory of an idle engine: weights and optimizer state go to the host, gradients nowhere.

        Any method that needs them brings them back first; one that is away already stays there.  Weights that are
        still being gathered are waited for.  ``beside``: only start the copies; ``settle`` frees the memory.
        """
        if self._host.away:
            if not beside:
                self._host.settle()
            return
        self.gather_weights()
        buffers = [buffer for chunk in self._wrapped for buffer in chunk.buffers]
        kept = [tensor for chunk in self.chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
        kept += [buffer.param_data for buffer in buffers if buffer.param_data is not None]
        kept += self.optimizer.tensors() if self.optimizer is not None else []
        self._host.free(kept, [buffer.grad_data for buffer in buffers], beside=beside)

    def reload(self, *, beside: bool = False) -> None:
        """Undo ``offload``.  ``beside``: only start to; whatever needs the weights waits for them."""
        self._host.restore(beside=beside)

    def settle(self) -> None:
        """Wait for copies that were started ``beside``."""
        self._host.settle()

    # Helpers ----------------------------------------------------------------------------------------------------

    def _train_mode(self, training: bool) -> None:
        for chunk in self.chunks:
            if chunk.training != training:
                chunk.train(training)

    def _hold_bias(self) -> None:
        """The head's bias gets no gradient in this step."""
        for chunk in self.chunks:
            bias = getattr(getattr(chunk, "output_layer", None), "bias", None)
            if bias is not None:
                bias.main_grad.zero_()

    def _seed_dropout(self) -> None:
        """Dropout masks depend on the step and the rank, on nothing before: resuming draws the same ones.

        Megatron-core has one random tracker for all the models of a process, so each update starts it anew.
        """
        if self.model.dropout == 0.0:
            return
        groups = self.groups
        seed = keyed_seed(self.seed, "dropout", self.num_updates, groups.pp_rank, groups.dp_rank, groups.cp_rank)
        seed_tracker(seed, groups)


class _Reading:
    """While the chunks are read: weights whole, no gathering hooks, evaluation mode."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> None:
        self.engine.reload()
        for chunk in self.engine._wrapped if self.engine._gathers_late else ():
            chunk.disable_forward_pre_hook(param_sync=True)
        self.engine._train_mode(False)

    def __exit__(self, *error: object) -> None:
        for chunk in self.engine._wrapped if self.engine._gathers_late else ():
            chunk.enable_forward_pre_hook()


def seed_tracker(seed: int, groups: ParallelGroups) -> None:
    """Megatron-core's random states: one shared by the tensor-parallel ranks, one of each rank's own."""
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed % 2**31, force_reset_rng=True, tp_rank=groups.tp_rank, ep_rank=0, etp_rank=groups.tp_rank
    )


def _chunk_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"


def _connected(terms: LossTerms, outputs: dict[str, Tensor]) -> Tensor:
    """The loss, with a graph even where no row took part: every rank must run every backward collective."""
    if terms.loss.requires_grad or not torch.is_grad_enabled():
        return terms.loss
    anchor = sum((output.sum() for output in outputs.values()), start=terms.loss.new_zeros(()))
    return terms.loss + 0.0 * anchor
