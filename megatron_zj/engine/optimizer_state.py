"""Optimizer state in model space: one tensor a parameter and moment, whatever the layout or the optimizer.

Megatron-core's own formats differ between its optimizers, and its distributed optimizer cannot resume torch's AdamW:
an optimizer that never stepped has no state to describe, ``step`` is missing where the tensors are copied back, and
after a load all parameters share one ``step`` tensor, which AdamW then advances once a *parameter*.  So the moments
(and the fp32 main weights of bf16 and fp16) are described here, keyed like the model's parameters, and written back
in place; the step count travels once, and every parameter keeps a ``step`` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_zj.engine.optimizer import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"


@dataclass(frozen=True)
class _Shard:
    """The part of one parameter's state that this rank owns: flat tensors, and where they stand in the parameter."""

    tensors: Mapping[str, Tensor]
    start: int
    end: int


def sharded_tensors(
    optimizer: Optimizer, modules: list[Module], model_state: Mapping[str, Any], loading: bool
) -> dict[str, dict[str, Any]]:
    """Sharded tensors of the moments and main weights, by chunk and parameter; collective over data parallelism.

    ``model_state``: the sharded state of the same modules.  ``loading``: only shapes matter, nothing is gathered.
    Saving the distributed optimizer's shards, the first data-parallel rank alone has something to describe.
    """
    prime(optimizer)
    described, _ = extract_sharded_tensors_and_factories(dict(model_state))
    by_parameter = {id(entry.data): entry for entry in nested_values(described)}
    whole = whole_tensors(optimizer, loading, everywhere=loading)
    result: dict[str, dict[str, Any]] = {}
    for name, parameter in _named(modules):
        if not parameter.requires_grad:
            continue
        found = {
            key: make_sharded_optimizer_tensor(by_parameter[id(parameter)], tensor, f"optimizer.state.{key}")
            for key, tensor in whole(parameter).items()
        }
        if found:
            result[name] = found
    return result


@torch.no_grad()
def load_tensors(
    optimizer: Optimizer, modules: list[Module], loaded: Mapping[str, Mapping[str, Tensor]], step: int
) -> None:
    """Write loaded moments and main weights in place; ``step``: optimizer steps they stand for."""
    prime(optimizer)
    for name, parameter in _named(modules):
        shard = _shard_of(optimizer, parameter)
        if name not in loaded or shard is None:
            continue
        for key, tensor in shard.tensors.items():
            tensor.view(-1).copy_(loaded[name][key].reshape(-1)[shard.start : shard.end])
    set_step(optimizer, step)


def set_step(optimizer: Optimizer, step: int) -> None:
    """Each parameter's own count (torch), or each group's (NVIDIA's fused Adam)."""
    for state in optimizer.adam.state.values():
        if "step" in state:
            state["step"].fill_(float(step))
    if not isinstance(optimizer.adam, torch.optim.AdamW):
        for group in optimizer.adam.param_groups:
            group["step"] = step


def prime(optimizer: Optimizer) -> None:
    """Give every parameter the state that AdamW would make at its first step."""
    for group in optimizer.adam.param_groups:
        for parameter in group["params"]:
            state = optimizer.adam.state[parameter]
            if state:
                continue
            state.update({key: torch.zeros_like(parameter.data, dtype=torch.float32) for key in MOMENTS})
            if isinstance(optimizer.adam, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def _named(modules: list[Module]) -> Iterator[tuple[str, Parameter]]:
    for index, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            yield f"{index}.{name}", parameter


def _shard_of(optimizer: Optimizer, parameter: Parameter) -> _Shard | None:
    """This rank's share of the parameter's state; None where another data-parallel rank owns all of it."""
    inner = optimizer.inner
    if not isinstance(inner, DistributedOptimizer):
        main = getattr(parameter, "main_param", parameter)
        state = optimizer.adam.state[main]
        tensors = {key: state[key] for key in MOMENTS}
        if main is not parameter:
            tensors[MAIN] = main
        return _Shard(tensors, 0, parameter.numel())
    if parameter not in inner.model_param_gbuf_map:
        return None
    part = inner._get_model_param_range_map(parameter)["param"]
    owned = inner._get_main_param_and_optimizer_states(parameter)
    tensors = {key: owned[key] for key in MOMENTS}
    if parameter.dtype != torch.float32:  # in fp32 the main weights are views of the model's
        tensors[MAIN] = owned["param"]
    return _Shard(tensors, part.start, part.end)


def whole_tensors(optimizer: Optimizer, loading: bool, everywhere: bool) -> Callable[[Parameter], dict[str, Tensor]]:
    """A function from a parameter to its state tensors in the parameter's shape; collective over data parallelism.

    ``loading``: zeros of that shape.  ``everywhere``: on all data-parallel ranks, else on the first one; the others'
    function gives nothing.
    """
    inner = optimizer.inner
    if not isinstance(inner, DistributedOptimizer):

        def own(parameter: Parameter) -> dict[str, Tensor]:
            shard = _shard_of(optimizer, parameter)
            return {} if shard is None else {key: value.view(parameter.shape) for key, value in shard.tensors.items()}

        return own
    gathered = inner.get_parameter_state_dp_zero(
        use_gloo_comm=False, empty_data=loading, return_on_all_ranks=everywhere
    )
    if gathered is None:
        return lambda parameter: {}
    places: dict[Parameter, tuple[dict[str, Tensor], int, int]] = {}
    for index, buffer in enumerate(inner.buffers):
        (world,) = gathered[index].values()
        for parameter, (start, end, _) in buffer.param_index_map.items():
            places[parameter] = (world, start, end)

    def cut(parameter: Parameter) -> dict[str, Tensor]:
        world, start, end = places[parameter]
        keys = {key: key for key in MOMENTS} | ({} if parameter.dtype == torch.float32 else {MAIN: "param"})
        return {name: world[key][start:end].view(parameter.shape) for name, key in keys.items()}

    return cut
