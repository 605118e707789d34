"""Where a run's weights and vocabulary come from, and what is refused before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_zj.checkpoint import retention, shared
from megatron_zj.cli.build import checked_tokenizer
from megatron_zj.cli.compose import compose_run
from megatron_zj.config.derived import starting_point
from megatron_zj.config.loader import ConfigError
from megatron_zj.data.errors import DataError
from tests.cli.commands import zj
from tests.cli.conftest import train_argv


def _starts(experiment: str, *overrides: str) -> dict[str, str | None]:
    config = compose_run([f"experiment=debug/{experiment}", *overrides])
    found = {name: starting_point(config, name) for name in config.algorithm.role_kinds}
    return {name: None if path is None else str(path) for name, path in found.items()}


def test_every_role_starts_from_its_own_weights_or_from_what_its_kind_says() -> None:
    given = ("checkpoint.load=runs/sft", "algorithm.reward.load=runs/reward")
    from_sft = {"actor": "runs/sft", "reference": "runs/sft"}
    assert _starts("ppo", *given) == {**from_sft, "critic": "runs/reward", "reward": "runs/reward"}
    own = "algorithm.critic.load=runs/critic"
    assert _starts("ppo", *given, own) == {**from_sft, "critic": "runs/critic", "reward": "runs/reward"}
    assert _starts("ppo", given[0])["reward"] is None  # never the policy's weights
    assert _starts("sft", given[0]) == {"model": "runs/sft"}
    assert _starts("sft", given[0], "algorithm.model.load=runs/other") == {"model": "runs/other"}
    assert _starts("pretrain", "checkpoint.load=null") == {"model": None}


def test_the_tokenizer_must_fit_the_models_rows(world: Path) -> None:
    def tokenizer(**changes: Any) -> int:
        argv = train_argv("sft", world, "unused", **changes)[1:]
        return checked_tokenizer(compose_run(argv)).vocab_size

    assert tokenizer() == 1300
    assert tokenizer(model__vocab_size=1400) == 1300  # rows to spare
    with pytest.raises(ConfigError, match="1299 rows, but the tokenizer has 1300 ids"):
        tokenizer(model__vocab_size=1299)
    with pytest.raises(DataError, match="gone"):
        tokenizer(tokenizer__path=world / "gone")


def test_what_cannot_start_says_so_before_any_model_is_built(world: Path) -> None:
    outcome = zj(train_argv("sft", world, "fresh", checkpoint__resume="must"))
    assert outcome.code == 1
    assert f"checkpoint.resume: 'must', but there is no complete checkpoint below {world / 'fresh'}" in outcome.error
    argv = train_argv("ppo", world, "no_reward", algorithm__reward__load="null")
    outcome = zj(argv)
    assert outcome.code == 1
    assert "algorithm.reward.load: not set; name the reward model's checkpoint" in outcome.error


def test_a_folder_with_checkpoints_is_not_for_a_run_that_does_not_resume(world: Path) -> None:
    """Its steps would stand among the older run's, whose last one would count as the newest."""
    files = {
        path: path.read_bytes() for path in (world / "sft").rglob("*") if path.is_file() and path.name != "log.txt"
    }
    outcome = zj(train_argv("sft", world, "sft", checkpoint__resume="never", optim__lr=1e-2))
    assert outcome.code == 1
    assert f"'never', but {world}/sft/checkpoints holds step_00000001 of an earlier run; choose another run.dir" in (
        outcome.error
    )
    assert {path: path.read_bytes() for path in files} == files


def test_ranks_on_nodes_of_their_own_are_told_before_anything_is_built(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_VISIBLE_SECONDS", 0.2)
    original = Path.exists
    unseen = lambda path: path.name.startswith(".shared_") and dist.get_rank() == 1  # noqa: E731
    monkeypatch.setattr(Path, "exists", lambda path: original(path) and not unseen(path))
    outcome = zj(train_argv("sft", world, "apart"), ranks=2)
    assert outcome.codes == (1, 1)
    assert "error: rank 1: on host " in outcome.output
    assert "run.dir must lie on a file system that all nodes share" in outcome.error
    assert not list((world / "apart").glob(".shared*"))


def test_ranks_that_see_differing_folders_resume_from_what_rank_0_sees(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = retention.complete_steps
    monkeypatch.setattr(retention, "complete_steps", lambda root: original(root) if dist.get_rank() == 0 else {})
    outcome = zj(train_argv("sft", world, "sft", run__num_steps=1), ranks=2)
    assert outcome.codes == (0, 0), outcome.output


def test_the_log_names_every_role_and_the_weights_it_got(world: Path) -> None:
    argv = train_argv("ppo", world, "roles", run__num_steps=2, run__profile_steps="[2]")
    outcome = zj(argv)
    assert outcome.code == 0, outcome.output
    step = "checkpoints/step_00000001"
    for line in (
        f"loaded weights of actor (from model) from {world}/sft/{step} (step 1)",
        f"loaded weights of reward (from model) from {world}/reward/{step} (step 1)",
    ):
        assert line in outcome.output
    assert [path.name for path in (world / "roles/profile").iterdir()] == ["step_00000002_rank_00000.json.gz"]


def test_a_finished_run_started_again_does_nothing_says_so_and_ends_well(world: Path) -> None:
    frozen = (world / "sft/config.yaml").read_bytes()
    outcome = zj(train_argv("sft", world, "sft", run__num_steps=1, optim__lr=5))
    assert outcome.code == 0
    assert "resuming from" in outcome.output
    assert "nothing to do: the run ended at step 1; raise run.num_steps to train on" in outcome.output
    assert "step 1/1" not in outcome.output
    assert (world / "sft/config.yaml").read_bytes() == frozen  # what the weights were trained with


def test_a_healthy_run_on_two_ranks_prints_its_own_lines_and_no_librarys_warnings(world: Path) -> None:
    outcome = zj(train_argv("pretrain", world, "healthy", run__num_steps=1), ranks=2)
    assert outcome.codes == (0, 0)
    assert outcome.outputs[1] == ""  # the distributed optimizer's shards included: nothing looks unequal when saved
    assert "Warning" not in outcome.output
    assert len(outcome.output.splitlines()) < 8
