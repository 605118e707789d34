"""The port: what it rewrites, when it is inert, that torch stays as it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_zj.parallel import cpu_port

_IMPORT_ALL = """
import sys, torch
before = (torch.cuda.current_device, torch.Tensor.cuda, torch.empty, torch.Tensor.type)
import megatron_zj.parallel
from megatron_zj.parallel import cpu_port
import megatron.core.tensor_parallel.random, megatron.core.pipeline_parallel.schedules, megatron.core.optimizer
import megatron.core.distributed, megatron.core.dist_checkpointing, megatron.core.models.gpt
assert (torch.cuda.current_device, torch.Tensor.cuda, torch.empty, torch.Tensor.type) == before
assert sum(isinstance(f, cpu_port._Finder) for f in sys.meta_path) == (not torch.cuda.is_available())
from megatron.core import parallel_state
assert not parallel_state.is_initialized()
print("ok", hasattr(parallel_state, "__host_cuda__"))
"""


def _ported(source: str, **names: object) -> dict[str, object]:
    tree = ast.fix_missing_locations(cpu_port.Port().visit(ast.parse(source)))
    scope: dict[str, object] = {
        "torch": torch,
        "__host_cuda__": cpu_port.host_cuda,
        "__to_host__": cpu_port.to_host,
        **names,
    }
    exec(compile(tree, "ported", "exec"), scope)
    return scope


@pytest.mark.parametrize(
    "expression",
    [
        "torch.empty(2, device=torch.cuda.current_device()).device.type == 'cpu'",
        "torch.zeros(1, device='cuda').device.type == 'cp' + 'u'",
        "torch.device('cuda:0').type == 'cp' + 'u'",
        "torch.zeros(1).type() == 'torch.cuda.FloatTensor'",
        "torch.ones(1).cuda(torch.cuda.current_device()).item() == 1",
        "torch.empty(3, pin_memory=True).shape == (3,)",
        "torch.cuda.device_count() == 1 and not torch.cuda.is_available()",
        "torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator",
        "torch.cuda.current_stream().record_event().query()",
        "torch.cuda.Stream is not None and torch.cuda.OutOfMemoryError is not None",
    ],
)
def test_cuda_code_runs_on_the_host(expression: str) -> None:
    assert _ported(f"value = {expression}")["value"] is True


def test_names_imported_from_torch_cuda_come_from_the_port() -> None:
    scope = _ported("from torch.cuda import _lazy_call, device, Event\n_lazy_call(lambda: seen.append(1))", seen=[])
    assert scope["seen"] == [1]
    assert scope["Event"] is cpu_port.Event


def test_the_random_state_is_the_hosts() -> None:
    scope = _ported("torch.cuda.manual_seed(5); a = torch.cuda.get_rng_state(); b = torch.rand(1)")
    scope["b2"] = _ported("torch.cuda.set_rng_state(a); b = torch.rand(1)", a=scope["a"])["b"]
    assert torch.equal(scope["b"], scope["b2"])  # type: ignore[arg-type]


def test_line_numbers_survive() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        _ported("x = torch.zeros(1).cuda()\ny = (\n 1 / 0)")
    assert error.traceback[-1].lineno + 1 == 3


def test_events_measure_milliseconds() -> None:
    first, second = cpu_port.Event(), cpu_port.Event()
    first.seconds, second.seconds = 1.0, 1.5
    assert first.elapsed_time(second) == 500.0


def test_megatron_core_imports_and_torch_itself_is_untouched() -> None:
    result = subprocess.run([sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == ["ok", str(not torch.cuda.is_available())]


def test_with_cuda_present_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, cpu_port._Finder)])
    assert cpu_port.install() is False
    assert not cpu_port.installed()


def test_installing_after_megatron_core_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, cpu_port._Finder)])
    monkeypatch.setitem(sys.modules, "megatron.core", torch)
    with pytest.raises(RuntimeError, match=r"import megatron_zj\.parallel first"):
        cpu_port.install()


def test_whatever_package_is_imported_first_the_port_comes_before_megatron_core() -> None:
    root = Path(cpu_port.__file__).parents[1]
    users = {path.relative_to(root).parts[0] for path in root.rglob("*.py") if "megatron.core" in path.read_text()}
    users.discard("parallel")
    assert users >= {"engine", "models"}
    for name in users:
        assert "import megatron_zj.parallel" in (root / name / "__init__.py").read_text(), name
