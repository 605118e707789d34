"""Damaged, foreign and useless checkpoints are refused by the file's name, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_zj.checkpoint import files as checkpoint_files
from megatron_zj.checkpoint import retention
from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.load import load, newest
from megatron_zj.checkpoint.manifest import read_manifest, read_tokenizer
from megatron_zj.config.model import ModelConfig, RopeScalingConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.tokenizer import Tokenizer
from tests.checkpoint.toy import MODEL, Toy, checkpointer, equal, tokenizer, toy
from tests.helpers.ranks import run_ranks

ROLE = "roles/model"


def _save_one(root: Path, pieces: Tokenizer) -> None:
    checkpointer(root, pieces).save(1, {"model": toy(ParallelConfig(tp=2), 1)}, {"n": 1})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    run_ranks(2, _save_one, root, tokenizer())
    return root / "step_00000001"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _retype(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"format_version": 1', '"format_version": "2"'))
    assert path.read_text() != text


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped bit in weights": (f"{ROLE}/model_00001.distcp", _flip, "damaged: its SHA-256"),
    "missing optimizer": (f"{ROLE}/optimizer_00000.distcp", Path.unlink, "is missing"),
    "truncated weights": (f"{ROLE}/model_00000.distcp", _truncate, "truncated"),
    "flipped bit in the index": (f"{ROLE}/index.json", _flip, "damaged"),
    "flipped bit in unsharded state": (f"{ROLE}/common.json", _flip, "damaged"),
    "missing algorithm state": ("algorithm.safetensors", Path.unlink, "is missing"),
    "flipped bit in the tokenizer": ("tokenizer/tokenizer.model", _flip, "damaged: its SHA-256"),
    "flipped bit in the manifest": ("manifest.json", _flip, "damaged"),
    "a version that is no number": ("manifest.json", _retype, "damaged"),
    "no manifest": ("manifest.json", Path.unlink, "its save was interrupted"),
}


def _load_all(folders: dict[str, Path]) -> dict[str, tuple[str, bool]]:
    seen = {}
    for name, folder in folders.items():
        target = toy(ParallelConfig(), 9)
        with pytest.raises(CheckpointError) as caught:
            load(folder, {"model": target})
        seen[name] = (str(caught.value), equal(target, toy(ParallelConfig(), 9)))
    return seen


def test_every_damage_is_refused_on_every_rank_with_the_files_name(sound: Path, tmp_path: Path) -> None:
    folders = {}
    for name, (file, damage, _) in DAMAGES.items():
        folders[name] = tmp_path / name.replace(" ", "_")
        shutil.copytree(sound, folders[name])
        damage(folders[name] / file)
    for rank in run_ranks(2, _load_all, folders):
        for name, (file, _, words) in DAMAGES.items():
            message, untouched = rank[name]
            assert words in message, (name, message)
            assert file in message, (name, message)
            assert untouched, name


def test_a_changed_tokenizer_is_refused_before_it_is_read(sound: Path, tmp_path: Path) -> None:
    """A tokenizer with other names for its special tokens reads well, and gives other ids."""
    assert read_tokenizer(sound, read_manifest(sound)).fingerprint() == tokenizer().fingerprint()
    folder = tmp_path / "changed"
    shutil.copytree(sound, folder)
    added = folder / "tokenizer/tokenizer_config.json"
    added.write_text(added.read_text().replace("</s>", "<s/>"))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is damaged"):
        read_tokenizer(folder, read_manifest(folder))


def _weights_only(folder: Path) -> bool:
    target = toy(ParallelConfig(), 9)
    load(folder, {"actor": target}, weights_only=True)
    return torch.equal(target.tensors["1"], toy(ParallelConfig(), 1).tensors["1"])


def test_weights_load_without_the_optimizer_files(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(sound, folder)
    for path in (folder / ROLE).glob("optimizer_*"):
        path.unlink()
    assert run_ranks(1, _weights_only, folder) == [True]


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (open, ("/tmp/zj-checkpoint-bomb", "w"))


def _reseal(folder: Path) -> None:
    """What a stranger can do: list the changed files in a manifest that is consistent."""
    manifest = read_manifest(folder)
    records = {name: checkpoint_files.record_of(folder / name) for name in manifest.files}
    text = json.dumps(dataclasses.replace(manifest, files=records).to_json())
    (folder / "manifest.json").write_text(text)


def test_code_in_pickled_files_of_a_checkpoint_never_runs(sound: Path, tmp_path: Path) -> None:
    bomb = Path("/tmp/zj-checkpoint-bomb")
    bomb.unlink(missing_ok=True)
    folder = tmp_path / "strangers"
    shutil.copytree(sound, folder)
    for name in (".metadata", "common.pt"):  # never opened
        (folder / ROLE / name).write_bytes(pickle.dumps(_Bomb()))
    _reseal(folder)
    assert run_ranks(1, _weights_only, folder) == [True]
    index = json.loads((folder / ROLE / "index.json").read_text())
    torch.save([_Bomb()], folder / ROLE / "evil_00000.distcp")
    size = (folder / ROLE / "evil_00000.distcp").stat().st_size
    index["tensors"]["layers.weight"]["chunks"][0][2:] = ["evil_00000.distcp", 0, size]
    (folder / ROLE / "index.json").write_text(json.dumps(index))
    _reseal(folder)
    (message,) = run_ranks(1, _refusal, folder, "lm", True)
    assert "evil_00000.distcp" in message
    assert not bomb.exists()


def _refusal(path: Path, head: str, weights_only: bool, role: str = "model", tokenizer: str | None = None) -> str:
    target = toy(ParallelConfig(), 9, head=head)
    with pytest.raises(CheckpointError) as caught:
        load(path, {role: target}, weights_only=weights_only, tokenizer=tokenizer)
    return str(caught.value)


def _mismatches(sound: Path, hugging_face: Path, megatron: Path) -> dict[str, str]:
    seen = {
        "hugging face": _refusal(hugging_face, "lm", False),
        "megatron": _refusal(megatron, "lm", False),
        "nowhere": _refusal(sound / "nowhere", "lm", False),
        "role": _refusal(sound, "lm", False, role="critic"),
        "head": _refusal(sound, "value", False),
    }
    for name, change in {
        "shape": {"ffn_hidden_size": 64},
        "rope": {"rope_scaling": RopeScalingConfig(kind="linear", factor=2.0)},
    }.items():
        target = toy(ParallelConfig(), 9)
        target.model = dataclasses.replace(MODEL, **change)
        with pytest.raises(CheckpointError) as caught:
            load(sound, {"model": target})
        seen[name] = str(caught.value)
    return seen


def test_foreign_and_mismatched_checkpoints_are_refused_with_what_to_do(sound: Path, tmp_path: Path) -> None:
    hugging_face, megatron = tmp_path / "hf", tmp_path / "megatron"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    megatron.mkdir()
    (megatron / "latest_checkpointed_iteration.txt").write_text("10")
    (seen,) = run_ranks(1, _mismatches, sound, hugging_face, megatron)
    assert f"zj convert --from {hugging_face}" in seen["hugging face"]
    assert "another Megatron" in seen["megatron"]
    assert "does not exist" in seen["nowhere"]
    assert "it has ['model']; set algorithm.critic.load_role" in seen["role"]
    assert "give it as checkpoint.load" in seen["head"]
    assert "ffn_hidden_size is 64 here and 352 in the checkpoint" in seen["shape"]
    assert "rope_scaling is RopeScalingConfig" in seen["rope"]


def _fresh_head(sound: Path) -> list[bool]:
    target = toy(ParallelConfig(tp=2), 9, head="value")
    before = target.tensors["head"].clone()
    load(sound, {"critic": target}, weights_only=True)
    lm_row = toy(ParallelConfig(tp=2), 1).tensors["head"][:1]
    return [
        torch.equal(target.tensors["head"], before),
        not torch.equal(target.tensors["head"], lm_row),
        torch.equal(target.tensors["2"], toy(ParallelConfig(tp=2), 1).tensors["2"]),
    ]


def test_a_critic_takes_the_body_of_a_language_model_and_keeps_its_fresh_head(sound: Path) -> None:
    assert run_ranks(2, _fresh_head, sound) == [[True] * 3] * 2


def _nan(root: Path) -> tuple[str, str]:
    model = toy(ParallelConfig(tp=2), 1)
    writer = checkpointer(root)
    writer.save(1, {"model": model}, {})
    if model.groups.tp_rank == 1:
        model.tensors["2"][0, 0] = float("nan")
    with pytest.raises(CheckpointError) as at_save:
        writer.save(2, {"model": model}, {})
    from megatron_zj.checkpoint import save, shards

    save.require_finite = lambda *_: None  # as another program would write it
    writer.save(3, {"model": model}, {})
    target = toy(ParallelConfig(tp=2), 9)
    save.require_finite = shards.require_finite
    with pytest.raises(CheckpointError) as at_load:
        load(root, {"model": target})
    return str(at_save.value), str(at_load.value)


def test_nan_weights_are_refused_at_save_and_at_load(tmp_path: Path) -> None:
    for at_save, at_load in run_ranks(2, _nan, tmp_path):
        assert "layers.weight holds NaN" in at_save
        assert "model_00001.distcp" in at_load
        assert "layers.weight holds NaN" in at_load
    assert set(retention.complete_steps(tmp_path)) == {1, 3}


def _full_disk(root: Path, asynchronous: bool) -> tuple[str, list[str]]:
    import resource

    model = toy(ParallelConfig(tp=2), 1)
    writer = checkpointer(root, async_save=asynchronous)
    writer.save(1, {"model": model}, {})
    writer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # bytes: writes fail in the middle of a weights file

    def save_and_wait() -> None:
        writer.save(2, {"model": model}, {})
        writer.wait()

    with pytest.raises(CheckpointError) as caught:
        save_and_wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torch.distributed.barrier()
    return str(caught.value), sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_is_a_clear_error_and_the_previous_checkpoint_stays(
    tmp_path: Path, asynchronous: bool
) -> None:
    for message, names in run_ranks(2, _full_disk, tmp_path, asynchronous):
        assert "no space left" in message
        assert ".distcp: File too large" in message
        assert "The checkpoints saved before are complete: free some space, lower checkpoint.keep_last" in message
        assert names == ["step_00000001"]
    assert newest(tmp_path) == tmp_path / "step_00000001"


def test_a_checkpoint_that_cannot_fit_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs 1073741824"):
        checkpoint_files.require_space(tmp_path, 2**50, "")


def test_the_shape_fields_that_only_cap_a_run_may_differ() -> None:
    assert dataclasses.replace(MODEL, max_position_embeddings=4096) != MODEL
    from megatron_zj.checkpoint.load import _differences

    assert _differences(dataclasses.replace(MODEL, max_position_embeddings=4096, kernels="torch"), MODEL) == {}
    assert _differences(ModelConfig(num_query_groups=4), ModelConfig()) == {}


def test_the_toy_differs_between_seeds(tmp_path: Path) -> None:
    def check() -> bool:
        return equal(toy(ParallelConfig(), 1), toy(ParallelConfig(), 2))

    assert run_ranks(1, check) == [False]
    assert Toy.__doc__
