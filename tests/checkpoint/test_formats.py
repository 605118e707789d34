"""What other programs see of a checkpoint: megatron-core reads it, people read it, and JSON keeps Python's types."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_zj.checkpoint import tree
from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.files import write_json
from megatron_zj.checkpoint.hf_config import read_config, write_config
from megatron_zj.checkpoint.shards import Index
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.parallel.groups import placement_world
from tests.checkpoint.toy import checkpointer, equal, toy
from tests.helpers.ranks import run_ranks

from megatron.core import dist_checkpointing  # isort: skip  after the CPU port


def _read_by_megatron(root: Path) -> tuple[bool, dict[str, Any]]:
    source = toy(ParallelConfig(tp=2), 3)
    checkpointer(root).save(1, {"model": source}, {})
    target = toy(ParallelConfig(pp=2), 8)
    with placement_world(target.groups):
        state = target.sharded_state(optimizer=True, loading=True)
        loaded = dist_checkpointing.load(state, str(root / "step_00000001" / "roles" / "model"))
    target.load_sharded_state(loaded)
    return equal(target, toy(ParallelConfig(pp=2), 3)), target.common


def test_megatron_cores_own_loader_reads_a_role_under_another_layout(tmp_path: Path) -> None:
    for same, common in run_ranks(2, _read_by_megatron, tmp_path):
        assert same
        assert common == {"step": 3, "betas": (0.9, 0.95), "lr": 1e-3}


def _inspector() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _save_one(root: Path) -> None:
    checkpointer(root).save(4, {"model": toy(ParallelConfig(), 3)}, {})


def test_the_inspector_shows_roles_and_tensors_and_finds_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, _save_one, tmp_path)
    inspector = _inspector()
    assert inspector.main([str(tmp_path), "--tensors", "--verify"]) == 0
    said = capsys.readouterr().out
    assert "step 4" in said
    assert "role model: lm head, with optimizer, written under pp1 dp1 cp1 tp1 vpp1" in said
    assert "layers.weight [4, 8, 8] float32, 4 pieces" in said
    assert "verified" in said
    (tmp_path / "step_00000004" / "algorithm.json").write_text("{}")
    assert inspector.main([str(tmp_path), "--verify"]) == 1
    assert "algorithm.json is truncated or changed" in capsys.readouterr().err


def test_a_tree_comes_back_with_its_types_and_bits(tmp_path: Path) -> None:
    odd = {
        "tuple": (1, [2.5, None, True]),
        "floats": [0.1, 1e-300, float("inf")],
        3: {"int": "key"},
        (1, 2): "tuple key",
        "__zj__": "a key that looks like a tag",
        "中文": "数据",
        "dtype": torch.bfloat16,
    }
    tensors = {"bf16": torch.randn(3).bfloat16(), "scalar": torch.tensor(2.5), "mask": torch.tensor([True, False])}
    tree.save_tree(tmp_path, "state", {**odd, "tensors": tensors})
    back = tree.load_tree(tmp_path, "state")
    loaded = back.pop("tensors")
    assert back == odd
    assert isinstance(back["tuple"], tuple)
    assert tree.fingerprint(loaded) == tree.fingerprint(tensors)
    assert tree.fingerprint({"a": torch.zeros(2)}) != tree.fingerprint({"a": torch.tensor([0.0, -0.0])})
    with pytest.raises(CheckpointError, match=r"state.inner\[0\] is a builtins.object"):
        tree.save_tree(tmp_path, "state", {"inner": [object()]})


@pytest.mark.parametrize("file", ["../../x.distcp", "/etc/passwd", "x.pt"])
def test_an_index_cannot_point_outside_its_folder(file: str) -> None:
    with pytest.raises(ValueError, match="not a file of this folder"):
        Index.from_json({"tensors": {}, "objects": {"a": [file, 0, 1]}})


def test_a_models_configuration_survives_config_json(tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=100, vocab_multiple=32, num_query_groups=2, head_dim=16, norm_eps=1e-5, dropout=0.1)
    for head in ("lm", "score", "value"):
        write_json(tmp_path / "config.json", write_config(model, head, "float32", {"rope_parameters": {"factor": 9.0}}))
        assert read_config(tmp_path)[:2] == (model, head)
