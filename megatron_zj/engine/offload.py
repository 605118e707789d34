"""Idle memory to the host: storages are freed for real (resized to 0), and every view of them is whole again after.

Works on storages, not tensors: parameters are views of megatron-core's buffers, so moving tensors would free nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage


class HostCopy:
    """The content of some tensors' storages, kept on the host while the storages themselves are empty."""

    def __init__(self) -> None:
        self._kept: list[tuple[UntypedStorage, Tensor]] = []
        self._scratch: list[tuple[UntypedStorage, int]] = []

    @property
    def away(self) -> bool:
        """Whether anything is on the host only."""
        return bool(self._kept or self._scratch)

    def free(self, kept: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> None:
        """Empty the storages; ``scratch`` is not copied and comes back as zeros.  Not while anything is ``away``."""
        throwaway = _storages(scratch)
        for pointer, storage in _storages(kept).items():
            if pointer not in throwaway:
                content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                host = torch.empty(content.shape, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                host.copy_(content)
                self._kept.append((storage, host))
        self._scratch = [(storage, storage.nbytes()) for storage in throwaway.values()]
        for storage in (*(entry[0] for entry in self._kept), *throwaway.values()):
            storage.resize_(0)

    def restore(self) -> None:
        """Fill the storages again."""
        for storage, host in self._kept:
            storage.resize_(host.numel())
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(host)
        for storage, size in self._scratch:
            storage.resize_(size)
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
        self._kept, self._scratch = [], []


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Distinct storages that hold something, by address."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return {pointer: storage for pointer, storage in found.items() if storage.nbytes()}
