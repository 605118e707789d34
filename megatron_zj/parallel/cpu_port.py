"""Makes ``megatron.core`` run on the CPU: the one place that knows it was written for CUDA only.

Where no CUDA device is present, every module below ``megatron.core`` is compiled from a rewritten syntax tree:

===================================  ==============================================================
``torch.cuda.X``                     ``__host_cuda__.X``, the stand-in of this file
``from torch.cuda import X``         ``from megatron_zj.parallel.cpu_port import X``
``"cuda"``, ``"cuda:0"``             ``"cpu"``
``"torch.cuda.FloatTensor"``         ``"torch.FloatTensor"``: names for ``Tensor.type``, three of them
``x.cuda(...)``                      ``__to_host__(x)``
``pin_memory=True``                  ``pin_memory=False``
===================================  ==============================================================

``torch`` itself is not touched, line numbers stay right, and where CUDA is present nothing happens at all: the same
calls run the same megatron-core.  ``megatron_zj.parallel`` installs the port before anything imports megatron-core.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any

import torch

_PACKAGE = "megatron.core"
_STRINGS = {"cuda": "cpu", "cuda:0": "cpu"} | {
    f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}


class Stream:
    """A stream of a device on which everything is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.priority = 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """An event at the present time."""
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class Event:
    """A point in time; ``elapsed_time`` in milliseconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, *args: Any) -> None:
        """Remember the present time."""
        self.seconds = time.perf_counter()

    def wait(self, *args: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds from this event to ``other``."""
        return (other.seconds - self.seconds) * 1e3


class _Generators:
    """``torch.cuda.default_generators``: whatever the index, the CPU's generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


class _RandomState:
    """``torch.cuda.random``: the CPU's state."""

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        """State of the CPU's generator."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        """Set the state of the CPU's generator."""
        torch.set_rng_state(state)


class _Nvtx:
    """``torch.cuda.nvtx``: no profiler listens."""

    @staticmethod
    def range_push(*args: Any, **kwargs: Any) -> None:
        """Nothing."""

    range_pop = mark = range_push

    @staticmethod
    def range(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """A context that does nothing."""
        return contextlib.nullcontext()


class HostCuda(_RandomState):
    """What megatron-core sees as ``torch.cuda``: one device, the CPU.  Names not defined here are torch.cuda's own."""

    Event = Event
    random = _RandomState
    nvtx = _Nvtx
    default_generators = _Generators()

    def __init__(self) -> None:
        self.Stream = Stream
        self._stream = Stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def is_available(self) -> bool:
        """False: this is no GPU."""
        return False

    def device_count(self) -> int:
        """One device, so that ``rank % device_count()`` works."""
        return 1

    def current_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def current_stream(self, device: Any = None) -> Stream:
        """The only stream."""
        return self._stream

    default_stream = current_stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        """A context that does nothing."""
        return contextlib.nullcontext()

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU's generator."""
        torch.manual_seed(seed)

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes in device memory: none."""
        return 0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    set_device = synchronize = empty_cache = set_stream = reset_peak_memory_stats = _nothing


host_cuda = HostCuda()


def _lazy_call(callback: Callable[[], Any], **kwargs: Any) -> None:
    callback()


def _lazy_init() -> None:
    return None


def device(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """``torch.cuda.device(...)`` as a context: there is only one device."""
    return contextlib.nullcontext()


def __getattr__(name: str) -> Any:
    """Any other name megatron-core imports from ``torch.cuda``."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(host_cuda, name)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.cuda(...)``."""
    return tensor.to("cpu")


class Port(ast.NodeTransformer):
    """The rewriting of the table above."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """``torch.cuda``."""
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name("__host_cuda__", ast.Load()), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """``x.cuda(...)``."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            return ast.copy_location(ast.Call(ast.Name("__to_host__", ast.Load()), [node.func.value], []), node)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        """``pin_memory=True``, which torch refuses without an accelerator."""
        self.generic_visit(node)
        if node.arg == "pin_memory" and isinstance(node.value, ast.Constant) and node.value.value is True:
            node.value = ast.copy_location(ast.Constant(False), node.value)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        """Device and tensor type names."""
        if isinstance(node.value, str) and node.value in _STRINGS:
            return ast.copy_location(ast.Constant(_STRINGS[node.value]), node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        """``from torch.cuda import ...``."""
        if node.module == "torch.cuda":
            node.module = __name__
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source; neither reads nor writes ``.pyc`` files, which belong to the original."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = Port().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(__host_cuda__=host_cuda, __to_host__=to_host)
        super().exec_module(module)
        _after_import(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron-core's modules where Python would, and gives them the loader above."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _PACKAGE and not name.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def _after_import(module: ModuleType) -> None:
    """Two things that no rewriting of names does."""
    if module.__name__ == f"{_PACKAGE}.jit":
        # torch.compile of three-line fusions costs seconds on a CPU and gains nothing.  Set before other modules
        # import the name.
        module.__dict__["jit_fuser"] = lambda function: function
    if module.__name__ == f"{_PACKAGE}.tensor_parallel.random":
        # The host's generator *is* the device's here, so this warning comes at every fork of the tracker.
        logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def needed() -> bool:
    """Whether there is no CUDA device, that is, whether megatron-core must be ported."""
    return not torch.cuda.is_available()


def installed() -> bool:
    """Whether the port is in force in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> bool:
    """Put the port in force, once, if there is no CUDA device; returns whether it is in force.

    Raises RuntimeError when megatron-core was imported first: its modules would then still ask for a GPU.
    """
    if not needed() or installed():
        return installed()
    if _PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_zj.parallel, so it cannot be ported to the CPU; "
            "import megatron_zj.parallel first"
        )
    sys.meta_path.insert(0, _Finder())
    return True
