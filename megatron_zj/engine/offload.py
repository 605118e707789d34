"""Idle memory to the host: storages are freed for real (resized to 0), and every view of them is whole again after.

Works on storages, not tensors: parameters are views of megatron-core's buffers, so moving tensors would free nothing.

Copies may run beside the computing.  Then what leaves is there until ``settle``, and what comes is there from
``restore`` on: for a while the device holds more, and nobody waits for a copy that has ended by the time it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

Wait = Callable[[], object]


class HostCopy:
    """The content of some tensors' storages, kept on the host while the storages themselves are empty."""

    def __init__(self) -> None:
        self._kept: list[tuple[UntypedStorage, Tensor]] = []
        self._scratch: list[tuple[UntypedStorage, int]] = []
        self._state: Literal["here", "leaving", "away", "coming"] = "here"
        self._wait: Wait = _nothing  # for the copies that run
        self._beside = _Beside()

    @property
    def away(self) -> bool:
        """Whether the storages must be restored before they are used: they are empty, or about to be."""
        return self._state in ("leaving", "away")

    def free(self, kept: Iterable[Tensor], scratch: Iterable[Tensor] = (), *, beside: bool = False) -> None:
        """Empty the storages; ``scratch`` is not copied and comes back as zeros.  Not while anything is ``away``.

        ``beside``: start the copies; ``settle`` empties the storages.  Nothing may write to them in between.
        """
        self.settle()
        throwaway = _storages(scratch)
        self._scratch = [(storage, storage.nbytes()) for storage in throwaway.values()]
        for pointer, storage in _storages(kept).items():
            if pointer not in throwaway:
                on_gpu = storage.device.type == "cuda"
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
                self._kept.append((storage, host))
        self._copy([(host, _bytes_of(storage)) for storage, host in self._kept], beside)
        self._state = "leaving"
        if not beside:
            self.settle()

    def restore(self, *, beside: bool = False) -> None:
        """Fill the storages again.  ``beside``: start to; they are whole after ``settle``, or a second ``restore``."""
        if self._state == "leaving":
            self._wait()  # the storages were never emptied
            for storage, _ in self._scratch:
                _bytes_of(storage).zero_()
            self._forget()
        elif self._state == "away":
            for storage, host in self._kept:
                storage.resize_(host.numel())
            for storage, size in self._scratch:
                storage.resize_(size)
                _bytes_of(storage).zero_()
            self._copy([(_bytes_of(storage), host) for storage, host in self._kept], beside)
            self._state = "coming"
        if not beside:
            self.settle()

    def settle(self) -> None:
        """End what was started ``beside``: what leaves is gone, what comes is whole."""
        if self._state == "leaving":
            self._wait()
            for storage, _ in (*self._kept, *self._scratch):
                storage.resize_(0)
            self._state = "away"
        elif self._state == "coming":
            self._wait()
            self._forget()

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], beside: bool) -> None:
        """Start copies (target, source), or do them."""
        self._wait = _nothing
        if beside:
            self._wait = self._beside.start(pairs)
        else:
            _copy_all(pairs)

    def _forget(self) -> None:
        self._kept, self._scratch, self._state = [], [], "here"


class _Beside:
    """Copies beside the computing: on a stream of their own on a GPU, by a thread of their own on a CPU."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self, pairs: list[tuple[Tensor, Tensor]]) -> Wait:
        """Begin copies (target, source); returns what waits for them, or makes the current stream wait."""
        device = next((tensor.device for pair in pairs for tensor in pair if tensor.is_cuda), None)
        if device is None:
            self._thread = self._thread or ThreadPoolExecutor(1, "offload")
            return self._thread.submit(_copy_all, pairs).result
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # writes before it; who had the memory before
        with torch.cuda.stream(self._stream):
            _copy_all(pairs, non_blocking=True)
        done = self._stream.record_event()
        return lambda: torch.cuda.current_stream(device).wait_event(done)


def _copy_all(pairs: list[tuple[Tensor, Tensor]], *, non_blocking: bool = False) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=non_blocking)


def _nothing() -> None:
    """Nothing to wait for."""


def _bytes_of(storage: UntypedStorage) -> Tensor:
    """All of a storage, as it is now."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Distinct storages that hold something, by address."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return {pointer: storage for pointer, storage in found.items() if storage.nbytes()}
