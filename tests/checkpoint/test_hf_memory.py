"""Conversion holds a tensor or two, never a model: peak memory of a 4 GiB checkpoint, both ways."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zj.checkpoint import safetensors_files
from megatron_zj.checkpoint.files import write_json
from megatron_zj.checkpoint.hf import export_hf, import_hf
from megatron_zj.checkpoint.hf_config import write_config
from megatron_zj.checkpoint.safetensors_files import Outgoing
from megatron_zj.config.model import ModelConfig
from megatron_zj.models.canonical import canonical_tensors

GIB = 1 << 30
LARGE = ModelConfig(
    vocab_size=32000, hidden_size=4096, ffn_hidden_size=11008, num_layers=10, num_attention_heads=32
)  # 4.3 GiB in bf16


def _make(folder: Path, model: ModelConfig, max_shard_bytes: int) -> int:
    """A folder of random bf16 weights; its size in bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def produce(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randint(-3000, 3000, shape, generator=generator, dtype=torch.int16)
        return values.to(torch.bfloat16) / 1000

    tensors = [
        Outgoing(tensor.name, tensor.shape, torch.bfloat16, lambda shape=tensor.shape: produce(shape))
        for tensor in canonical_tensors(model, "lm")
    ]
    safetensors_files.write_folder(folder, tensors, max_shard_bytes)
    write_json(folder / "config.json", write_config(model, "lm", "bfloat16", {}))
    return sum(tensor.size for tensor in tensors)


def _measure(action: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], pipe: Any) -> None:
    action(*args, **options)
    # VmHWM belongs to this program's memory alone; ru_maxrss would count the process that started it too.
    status = Path("/proc/self/status").read_text()
    pipe.send(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024)


def _peak(action: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Peak resident bytes of a process of its own that does this and nothing else, imports included."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(action, args, options, sender))
    process.start()
    sender.close()
    peak: int = receiver.recv()
    process.join()
    return peak


def _check(tmp_path: Path, model: ModelConfig, shard: int, budget: int) -> None:
    size = _make(tmp_path / "hf", model, shard)
    imported = _peak(import_hf, tmp_path / "hf", tmp_path / "zj")
    exported = _peak(export_hf, tmp_path / "zj", tmp_path / "back", max_shard_bytes=shard)
    for name in sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors")):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    assert imported <= budget, f"import of {size / GIB:.2f} GiB peaked at {imported / GIB:.2f} GiB"
    assert exported <= budget, f"export of {size / GIB:.2f} GiB peaked at {exported / GIB:.2f} GiB"
    print(f"{size / GIB:.2f} GiB: import peak {imported / GIB:.2f} GiB, export peak {exported / GIB:.2f} GiB")


@pytest.mark.slow
def test_converting_4_gib_peaks_below_the_largest_shard_plus_1_gib(tmp_path: Path) -> None:
    _check(tmp_path, LARGE, shard=GIB // 2, budget=GIB // 2 + GIB)
