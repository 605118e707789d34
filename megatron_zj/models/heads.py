"""What stands on the last hidden states: token log-probabilities, a value a token, or a score a sequence.

No head gives logits to an objective.  Each keeps the name ``output_layer`` in the module tree, which megatron-core
expects, and a parameter name of its own in checkpoints.

Legend: T slots of this context-parallel rank, D hidden size, V vocabulary rows of this rank, R rows of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from kernels.linear_logprob import combine_partials, linear_logprob_partials
from kernels.reward_head import reward_head
from kernels.value_head import value_head
from megatron_zj.config.model import HeadKind, Want
from megatron_zj.models.transformer_config import LlamaConfig

if TYPE_CHECKING:
    from megatron_zj.data.packing import PackedBatch

GIVES: dict[HeadKind, tuple[Want, ...]] = {
    "lm": ("logprobs", "entropy"),
    "value": ("values",),
    "score": ("scores", "values"),
}


def check_wants(head: HeadKind, wants: Sequence[Want]) -> None:
    """Raise ValueError when this head cannot give what is asked."""
    missing = [want for want in wants if want not in GIVES[head]]
    if missing:
        raise ValueError(f"a model with a {head!r} head gives {GIVES[head]}, not {missing}; build it with another head")


class LmHead(ColumnParallelLinear):  # type: ignore[misc]
    """Log-probability and entropy over a vocabulary sharded over tp; of [T, V] a bounded part exists at a time.

    ``vocab_size``: real rows; the rest of the padded vocabulary has probability 0.
    """

    def __init__(self, config: LlamaConfig, weight: nn.Parameter | None, rows: int, vocab_size: int, tp: Any) -> None:
        super().__init__(
            config.hidden_size,
            rows,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=tp,
        )
        self.config = config
        self.weight = weight  # None: tied to the embedding of this stage
        self.vocab_start = tp.rank() * self.output_size_per_partition
        self.valid_rows = min(max(vocab_size - self.vocab_start, 0), self.output_size_per_partition)

    def forward(
        self,
        hidden: Tensor,
        packed: PackedBatch,
        wants: Sequence[Want],
        temperature: float = 1.0,
        weight: Tensor | None = None,
    ) -> dict[Want, Tensor]:
        """``logprobs`` and ``entropy`` of ``packed.labels``, [T] fp32, the same on every tp rank.

        ``hidden``: [T (/ tp under SP), 1, D].  Slots without a target, or not read, hold 0.
        """
        asked_T = packed.targets
        if packed.read is not None:
            asked_T = asked_T & torch.zeros_like(asked_T).index_fill_(0, packed.read, True)
        with self.config.kernel_backend():
            partials = linear_logprob_partials(
                self._whole(hidden),
                self._matrix(weight),
                packed.labels,
                temperature=temperature,
                mask_T=asked_T,
                vocab_start=self.vocab_start,
                valid_rows=self.valid_rows,
                entropy="entropy" in wants,
            )
        if self.tp_group.size() > 1:
            logprobs, entropy = combine_partials(partials, self._maximum, self._sum)
        else:
            logprobs, entropy = combine_partials(partials)
        outputs: dict[Want, Tensor] = {"logprobs": logprobs, "entropy": entropy}
        # Over tp, exponents that are all 0 at a masked slot still count one share a rank.
        return {want: outputs[want].where(asked_T, 0.0) for want in wants}

    def _matrix(self, tied: Tensor | None) -> Any:
        return self.weight if tied is None else tied

    def _whole(self, hidden: Tensor) -> Tensor:
        """[T, D] on every tp rank; each rank's gradient is a part of the sum, so backward adds them up."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        whole_TD: Tensor = hidden.squeeze(1)
        return whole_TD

    def _maximum(self, lse_T: Tensor) -> Tensor:
        highest: Tensor = gather_from_sequence_parallel_region(lse_T[None], group=self.tp_group).amax(0)
        return highest

    def _sum(self, terms: Tensor) -> Any:
        return reduce_from_tensor_model_parallel_region(terms, group=self.tp_group)


class ScalarHead(nn.Module):
    """A [1, D] weight, the same on every tp rank; computed in fp32.

    Under SP each rank's gradient covers its own tokens, so megatron-core is told to sum it over tp.
    """

    def __init__(self, config: LlamaConfig, pg_collection: ProcessGroupCollection, bias: bool) -> None:
        super().__init__()
        self.config = config
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(1, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ValueHead(ScalarHead):
    """One value a token: the critic."""

    def __init__(self, config: LlamaConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection, bias=False)

    def forward(self, hidden: Tensor) -> dict[Want, Tensor]:
        """``values`` [T] fp32, of the final hidden states [T (/ tp under SP), 1, D]."""
        with self.config.kernel_backend():
            values_T = value_head(hidden.squeeze(1), self.weight)
        if self.sequence_parallel:
            # Every tp rank goes on with the same values, so each takes its own slice of the gradient: with the
            # default (a sum over ranks) everything below would get tp times its gradient.
            values_T = gather_from_sequence_parallel_region(
                values_T, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return {"values": values_T}


class ScoreHead(ScalarHead):
    """One score a sequence, read at its last token, or the same map of every token: the reward model.

    It applies the final norm itself, to the tokens it reads.
    """

    def __init__(self, config: LlamaConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection, bias=True)

    def forward(
        self, hidden: Tensor, packed: PackedBatch, norm_weight: Tensor, wants: Sequence[Want] = ("scores",)
    ) -> dict[Want, Tensor]:
        """``scores`` [R] fp32, the same on all tp and cp ranks; ``hidden`` before the final norm.

        ``values``: the score that each of the [T] slots would give if its row ended there.

        Backward sums the gradients that the cp ranks give to their copies of a score: a loss over scores must be
        counted on one cp rank, or by 1 / cp on each.
        """
        outputs: dict[Want, Tensor] = {}
        if "values" in wants:
            slots = torch.arange(hidden.shape[0], device=hidden.device)
            values_T = self._read(hidden, slots, norm_weight)
            if self.sequence_parallel:
                values_T = gather_from_sequence_parallel_region(
                    values_T, tensor_parallel_output_grad=False, group=self.tp_group
                )
            outputs["values"] = values_T
        if "scores" in wants:
            outputs["scores"] = self._scores(hidden, packed.last, norm_weight)
        return outputs

    def _scores(self, hidden: Tensor, last: Tensor, norm_weight: Tensor) -> Tensor:
        if self.sequence_parallel:
            start = self.tp_group.rank() * hidden.shape[0]
            inside = (last >= start) & (last < start + hidden.shape[0])
            last = torch.where(inside, last - start, -1)
        scores_R = self._read(hidden, last, norm_weight)
        if self.sequence_parallel:
            scores_R = _sum_over(scores_R, self.tp_group, sum_gradients=False)
        if self.cp_group.size() > 1:
            scores_R = _sum_over(scores_R, self.cp_group, sum_gradients=True)
        return scores_R

    def _read(self, hidden: Tensor, slots: Tensor, norm_weight: Tensor) -> Tensor:
        with self.config.kernel_backend():
            return reward_head(
                hidden.squeeze(1),
                slots,
                self.weight,
                self.bias,
                norm_weight_D=norm_weight,
                eps=self.config.layernorm_epsilon,
            )


def _sum_over(values_R: Tensor, group: Any, sum_gradients: bool) -> Tensor:
    """Sum over the ranks; backward gives the rank's own gradient, or the sum of all ranks' gradients.

    A gather and a local sum: megatron-core's all-reduce drops its result for a gradient that is not contiguous.
    """
    gathered: Tensor = gather_from_sequence_parallel_region(
        values_R[None], tensor_parallel_output_grad=sum_gradients, group=group
    )
    return gathered.sum(0)
