"""Guards around the bodies of ops: no autocast inside, and no derivative of a gradient that would be wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(body: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The body, which chooses its own dtypes, is not cast again where the caller stands inside ``torch.autocast``."""

    @functools.wraps(body)
    def guarded(first: Tensor, /, *args: P.args, **options: P.kwargs) -> R:
        device = first.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return body(first, *args, **options)
        with torch.autocast(device, enabled=False):
            return body(first, *args, **options)

    return guarded


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward pass whose gradients refuse to be differentiated again.

    torch's decorator of the name refuses only where the incoming gradient itself has one: with a constant one the
    second derivative through the saved tensors would be left out without a word.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():  # every backward pass that is not made with create_graph
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        through = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        if not through:
            return found
        if isinstance(found, Tensor):
            return _Refused.apply(found, *through)
        return tuple(_Refused.apply(x, *through) if isinstance(x, Tensor) else x for x in found)

    return guarded


class _Refused(torch.autograd.Function):
    """A gradient, tied to the tensors it depends on by a derivative that is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_through: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Any:
        raise NotImplementedError("this op is differentiable once: it has no second derivative")
