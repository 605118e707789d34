"""``zj check``: the whole answer of the command, as a user gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zj.cli.check import largest_phase
from megatron_zj.cli.compose import compose_run, save_frozen
from megatron_zj.cli.main import main


def zj_check(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["check", *argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_it_prints_the_grid_and_the_arithmetic_of_a_large_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = zj_check(capsys, "experiment=zhongjing/pretrain", "world_size=64")
    assert code == 0
    assert "all: ranks 0-63 = pp 1 x dp 16 x cp 1 x tp 4, sequence parallel; holds model" in shown
    assert "tp       [0-3] [4-7] [8-11] [12-15] ... (16 groups)" in shown
    assert "dp       [0,4,..,60] [1,5,..,61]" in shown
    assert "64 rows over dp 16 = 4 a rank, 32,768 tokens" in shown
    assert "13.1B parameters" in shown
    assert "memory   model: 21.38 GiB = weights 6.10 + gradients 12.19 + optimizer 2.29 + activations" in shown
    # 40 layers, and the vocabulary twice, over tp 4: fp32 masters and two moments, 12 bytes a parameter on every rank
    host = 12 * (40 * (4 * 5120**2 + 3 * 5120 * 13824) + 2 * 39424 * 5120) / 4 / 2**30
    assert f"memory   of the host to resume: {host:.2f} GiB for each rank of a node" in shown
    assert "to give    data.files: empty" in shown
    assert shown.endswith("ok\n")
    plain = ("experiment=zhongjing/pretrain", "world_size=64", "engine.distributed_optimizer=false")
    assert "to resume" not in zj_check(capsys, *plain)[1]


def test_colocated_models_add_up_to_what_a_rank_must_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Zhongjing's four 13B models on one node, by hand: see the arithmetic below."""
    _, shown, _ = zj_check(capsys, "experiment=zhongjing/ppo", "--elsewhere")
    layer = 4 * 5120**2 + 3 * 5120 * 13824
    vocabulary = 39424 * 5120
    trained = 2 + 4 + 12  # bf16 weights, fp32 gradients, fp32 masters and two moments, bytes
    actor = (40 * layer + 2 * vocabulary) / 8
    critic = (40 * layer + vocabulary) / 8
    cache = 64 * 1024 * 40 * 2 * 5120 * 2 / 8  # 64 rows of 1,024 tokens
    gib = (trained * (actor + critic) + 2 * (actor + critic) + cache) / 2**30
    assert f"actor's key/value cache in rollouts: {cache / 2**30:.2f} GiB" in shown
    (together,) = [line.split()[2] for line in shown.splitlines() if "together" in line]
    assert float(together) == pytest.approx(gib, abs=0.05)


def test_idle_models_on_the_host_leave_the_largest_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = zj_check(capsys, "experiment=zhongjing/ppo", "--elsewhere", "engine.offload_idle=true")
    sizes = [float(line.split()[2]) for line in shown.splitlines() if line.startswith("  memory   ") and " = " in line]
    (cache,) = [float(line.split()[-2]) for line in shown.splitlines() if "key/value cache" in line]
    (together,) = [line for line in shown.splitlines() if "together" in line]
    assert "engine.offload_idle keeps idle models on the host" in together
    assert max(sizes) <= float(together.split()[2]) <= max(sizes) + cache
    assert sum(sizes) > 1.5 * float(together.split()[2])
    overlapping = ("engine.offload_idle=true", "engine.overlap_offload=true")
    _, shown, _ = zj_check(capsys, "experiment=zhongjing/ppo", "--elsewhere", *overlapping)
    (longer,) = [line for line in shown.splitlines() if "together" in line]
    own = [line.split("activations ") for line in shown.splitlines() if "activations" in line]
    kept = sorted(float(before.split()[2]) - float(activations) for before, activations in own)
    assert float(longer.split()[2]) - float(together.split()[2]) == pytest.approx(sum(kept[-3:-1]), abs=0.03)


def test_an_unknown_rule_reward_is_told_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = zj_check(capsys, "experiment=demo/ppo", "--elsewhere", "algorithm.rules.varid=1")
    assert code == 1
    assert "algorithm.rules.varid: no such rule; did you mean 'varied'?" in " ".join(shown.split())


def test_with_overlapping_offload_two_other_models_are_there_whoever_computes() -> None:
    kept = {"critic": 40, "actor": 20, "reference": 10, "reward": 10}
    working = {"critic": 5, "actor": 50, "reference": 2, "reward": 2}
    assert largest_phase(kept, working, ()) == 20 + 50
    assert largest_phase(kept, working, kept) == 20 + 50 + 40 + 10
    assert largest_phase(kept, working, {"actor", "reward"}) == 20 + 50 + 10
    assert largest_phase({}, {}, ()) == 0


def test_every_experiment_can_be_described(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demo/pretrain", "demo/sft", "demo/reward", "demo/ppo", "zhongjing/ppo"):
        code, shown, _ = zj_check(capsys, f"experiment={name}", "--elsewhere")
        assert code == 0, shown


def test_an_impossible_layout_is_an_error_without_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = zj_check(capsys, "experiment=demo/sft", "parallel.tp=3", "--no-files")
    assert code == 1
    assert "ERROR      parallel: tp 3 x pp 1 x cp 1 = 3 does not divide the 2 ranks" in shown
    assert shown.endswith("1 error\n")


def test_missing_files_are_errors_unless_the_run_is_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    gone = "data.files=[gone.jsonl]"
    code, shown, _ = zj_check(capsys, "experiment=debug/sft", gone)
    assert code == 1
    assert "ERROR      data.files[0]: gone.jsonl does not exist" in shown
    assert zj_check(capsys, "experiment=debug/sft", gone, "--elsewhere")[0] == 0
    assert zj_check(capsys, "--no-files", "experiment=debug/sft", gone)[0] == 0


def test_a_mistyped_key_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, complaint = zj_check(capsys, "optim.lrr=1")
    assert (code, shown) == (1, "")
    assert complaint.splitlines()[0] == "error: optim.lrr: unknown key; did you mean 'lr'?"


def test_a_frozen_file_can_be_checked_and_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_frozen(compose_run(["experiment=debug/pretrain"]), tmp_path / "config.yaml")
    code, shown, _ = zj_check(capsys, "--config", str(tmp_path / "config.yaml"), "--show")
    assert code == 0
    assert "vocab_multiple: 64" in shown
