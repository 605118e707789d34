"""``zj launch`` with a stand-in for training: sweeps, folders, states, SLURM arrays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_zj.cli.compose import compose_run, load_frozen
from megatron_zj.cli.jobs import ENVIRONMENT, Job, expand, torchrun_command
from megatron_zj.cli.launch import TRAIN, main
from megatron_zj.config.loader import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ("experiment=debug/pretrain", "--no-files")

# A job's place is written; the point (lr 0.2, seed 2) fails.
STAND_IN = """
import json, os, sys
from collections.abc import Callable
from pathlib import Path
from megatron_zj.cli.compose import load_frozen
config = load_frozen(Path(sys.argv[1]))
if (config.optim.lr, config.run.seed) == (0.2, 2):
    sys.exit("error: planned failure")
seen = {"lr": config.optim.lr, "seed": config.run.seed, "env": os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]}
(config.run.dir / f"result_{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "stand_in.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{STAND_IN}")
    return (str(path),)


def without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stand-in directly as rank 0: torchrun takes seconds to start, and one test with it is enough."""

    def direct(job: Job, train: tuple[str, ...], max_restarts: int) -> list[str]:
        variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        return ["env", "RANK=0", *variables, sys.executable, *train, str(job.folder / "config.yaml")]

    monkeypatch.setattr("megatron_zj.cli.jobs.torchrun_command", direct)


def states(root: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["state"] for path in sorted(root.glob("*/status.json"))}


def test_a_two_by_two_sweep_with_a_failing_point_gives_three_results_and_names_the_failure(
    tmp_path: Path,
    stand_in: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_torchrun(monkeypatch)
    root = tmp_path / "sweep"
    argv = ["--multirun", *DEBUG, "optim.lr=0.1,0.2", "run.seed=1,2", "run.num_steps=9", "--dir", str(root)]
    assert main(argv, stand_in) == 1
    shown = capsys.readouterr().out
    assert states(root) == {
        "000_optim.lr=0.1,run.seed=1": "done",
        "001_optim.lr=0.1,run.seed=2": "done",
        "002_optim.lr=0.2,run.seed=1": "done",
        "003_optim.lr=0.2,run.seed=2": "failed",
    }
    results = [json.loads(path.read_text()) for path in sorted(root.glob("*/result_0.json"))]
    assert [(result["lr"], result["seed"]) for result in results] == [(0.1, 1), (0.1, 2), (0.2, 1)]
    assert (
        "FAILED 003_optim.lr=0.2,run.seed=2: experiment=debug/pretrain optim.lr=0.2 run.seed=2 run.num_steps=9" in shown
    )
    assert "  error: planned failure\n" in shown
    frozen = load_frozen(root / "003_optim.lr=0.2,run.seed=2" / "config.yaml")
    assert (frozen.run.dir, frozen.world_size) == (root / "003_optim.lr=0.2,run.seed=2", 1)

    assert main(argv, stand_in) == 1  # again: what is done is not run again
    assert capsys.readouterr().out.count("done before") == 3
    assert main(["--status", str(root)]) == 0
    assert "003_optim.lr=0.2,run.seed=2  failed" in capsys.readouterr().out


def test_torchrun_runs_every_rank_on_the_frozen_configuration(tmp_path: Path, stand_in: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    assert main([*DEBUG, f"run.dir={folder}", "world_size=2", "run.seed=5"], stand_in) == 0
    results = [json.loads((folder / f"result_{rank}.json").read_text()) for rank in (0, 1)]
    assert results == [{"lr": 1e-3, "seed": 5, "env": "1"}] * 2
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)


def test_nothing_starts_when_any_point_is_wrong(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    with pytest.raises(ConfigError) as caught:
        main(["-m", *DEBUG, "parallel.tp=1,3", "run.seed=1,2", "--dir", str(root)], ("-c", "raise SystemExit(1)"))
    assert [problem[:39] for problem in caught.value.problems] == [
        "point 2 (experiment=debug/pretrain para",
        "point 3 (experiment=debug/pretrain para",
    ]
    assert not root.exists()


def test_missing_files_are_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.files\[0\]: gone does not exist"):
        main(["experiment=debug/pretrain", "data.files=[gone]", f"run.dir={tmp_path / 'run'}"], ("-c", ""))
    assert not (tmp_path / "run").exists()


def test_a_sweep_never_overwrites_another_configuration(
    tmp_path: Path, stand_in: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_torchrun(monkeypatch)
    argv = ["-m", *DEBUG, "run.seed=1,3", "--dir", str(tmp_path / "sweep")]
    assert main(argv, stand_in) == 0
    frozen = tmp_path / "sweep" / "000_run.seed=1" / "config.yaml"
    frozen.write_text(frozen.read_text().replace("num_steps: 4", "num_steps: 5"))
    with pytest.raises(ConfigError, match="is another configuration; give another --dir"):
        main(argv, stand_in)


def test_a_lone_run_goes_on_with_other_settings_whatever_its_folder_is_called(
    tmp_path: Path, stand_in: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_torchrun(monkeypatch)
    folder = tmp_path / "20261121"  # three digits and more, as a sweep's jobs have
    for steps in (3, 5):
        assert main([*DEBUG, f"run.dir={folder}", f"run.num_steps={steps}"], stand_in) == 0
    assert load_frozen(folder / "config.yaml").run.num_steps == 5
    assert f"{folder}: 1 ranks" in capsys.readouterr().out  # the whole folder, not its name alone


@pytest.mark.parametrize("option", ["--nodes", "--nproc", "--parallel-jobs"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_number_of_ranks_nodes_or_jobs_is_one_or_more(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--slurm", *DEBUG, f"{option}={value}"])
    assert ended.value.code == 2
    assert f"must be a whole number >= 1, got '{value}'" in capsys.readouterr().err


def test_sweeps_follow_hydras_grammar() -> None:
    assert expand(["a=1", "b=x,y", "c=range(1,3)"]) == [
        ("a=1", "b=x", "c=1"),
        ("a=1", "b=x", "c=2"),
        ("a=1", "b=y", "c=1"),
        ("a=1", "b=y", "c=2"),
    ]
    assert expand(["a=[1,2]", "b='x,y'"]) == [("a=[1,2]", "b='x,y'")]
    assert [compose_run(point).data.files for point in expand(["data.files=[甲],[乙]"])] == [("甲",), ("乙",)]
    assert expand(["experiment=glob([debug/p*,demo/sft],exclude=debug/ppo)"]) == [
        ("experiment=debug/pretrain",),
        ("experiment=demo/sft",),
    ]


@pytest.mark.parametrize(
    ("axis", "complaint"),
    [
        ("run.seed=range(1,1)", "this sweep has no value"),
        ("run.seed=range(3,1)", "this sweep has no value"),
        ("run.seed=range(1,2,0)", "must not be zero"),
        ("optim.lr=range(0.1,0.2,0.0)", "Invalid range values"),
        ("optim.lr=interval(0,1)", "can be swept"),
        ("experiment=glob(debug/x*)", "this sweep matches no option of conf/experiment"),
        ("optim.lr=glob(*)", "this sweep matches no option of conf/optim.lr"),
    ],
)
def test_a_sweep_without_values_is_named(axis: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        main(["--multirun", "--no-files", "experiment=debug/sft", axis])
    assert repr(axis) in str(caught.value)


def test_a_sweep_over_experiments_has_the_folder_of_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "--no-files", "--dry-run", "experiment=glob(debug/p*)"]) == 0
    shown = capsys.readouterr().out
    assert "runs/sweeps/sweep/000_experiment=debug_ppo/" in shown
    assert "runs/sweeps/sweep/001_experiment=debug_pretrain/" in shown


@pytest.mark.parametrize("words", [["--multirun", "run.seed=1,2"], ["--slurm"]])
@pytest.mark.parametrize("override", ["run.dir=mine", "++run.dir=mine"])
def test_run_dir_is_the_folder_of_all_jobs_unless_dir_says_another(
    words: list[str], override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *DEBUG, override, "--dry-run"]) == 0
    assert " mine/000" in capsys.readouterr().out
    assert main([*words, *DEBUG, override, "--dry-run", "--dir=jobs"]) == 0
    shown = capsys.readouterr()
    assert " jobs/000" in shown.out
    assert "run.dir is not used: each job has its own folder below --dir=jobs" in shown.err


def test_run_dir_itself_is_not_swept() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir: a job's folder is named by what is swept"):
        main(["--multirun", *DEBUG, "run.dir=a,b", "--dry-run"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dir=x"], "a lone run's folder is run.dir=..."),
        (["--nodes=8"], "--nodes: for --slurm alone"),
        (["--nodes=1", "--time=24:00:00", "--gpus-per-node=8"], "--nodes, --gpus-per-node, --time: for --slurm alone"),
        (["-m", "--partition=a", "--account=b"], "--partition, --account: for --slurm alone"),
        (["-m", "--cpus-per-rank=4", "--parallel-jobs=8"], "--cpus-per-rank, --parallel-jobs: for --slurm alone"),
    ],
)
def test_an_option_without_effect_is_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--dry-run", *DEBUG, *words])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["[]", "5", "nope", '{"state": []}', '{"seconds": 1}', "\0"])
def test_a_damaged_status_counts_as_waiting(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-m", "--slurm", *DEBUG, "run.seed=1,2", "--dir", str(tmp_path)])
    (tmp_path / "000_run.seed=1/status.json").write_text(damage)
    assert main(["--status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(" waiting ") == 2


@pytest.mark.parametrize("damage", ["5", "nope", '"run.seed=1"', "[1]", "{}"])
def test_damaged_overrides_of_a_job_are_named(damage: str, tmp_path: Path) -> None:
    main(["-m", "--slurm", *DEBUG, "run.seed=1,2", "--dir", str(tmp_path)])
    path = tmp_path / "001_run.seed=2" / "overrides.json"
    path.write_text(damage)
    with pytest.raises(ConfigError) as caught:
        main(["--status", str(tmp_path)])
    assert str(caught.value).startswith(f"{path}: not a list of overrides")


def test_a_dry_run_prints_the_whole_command_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["--dry-run", *DEBUG, f"run.dir={folder}", "run.device=cpu", "--max-restarts", "2"]) == 0
    shown = capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES= " in shown  # or megatron-core takes the GPU
    assert f"--nproc-per-node 1 --max-restarts 2 -m megatron_zj.cli.train --config {folder}/config.yaml" in shown
    assert not folder.exists()


def test_a_number_of_ranks_that_contradicts_the_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="laid out for 1 ranks and 2 are running"):
        main([*DEBUG, "--nproc", "2", f"run.dir={tmp_path / 'run'}"])


def test_slurm_gets_one_array_that_bash_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "it's a sweep"
    argv = ["-m", "--slurm", "--nodes", "8", "--time", "3-00:00:00", "--partition", "gpu", "--dir", str(root)]
    assert main([*argv, "experiment=zhongjing/pretrain", "layout=64gpu", "optim.lr=1e-5,5e-5", "--no-files"]) == 0
    script = root / "sweep.sbatch"
    assert f"submit with: sbatch {script}" in capsys.readouterr().out
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    asked = ("--array=0-1%8", "--nodes=8", "--gpus-per-node=8", "--cpus-per-task=32", "--time=3-00:00:00")
    for line in (*asked, "--partition=gpu"):
        assert f"#SBATCH {line}\n" in text
    assert "srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task=32 " in text
    folders = (root / "jobs.txt").read_text().splitlines()
    assert [load_frozen(Path(folder) / "config.yaml").optim.lr for folder in folders] == [1e-5, 5e-5]
    assert states(root) == dict.fromkeys((Path(folder).name for folder in folders), "waiting")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["experiment=debug/pretrain", "world_size=1,2"], "one array has one size of job, this sweep has [1, 2] ranks"),
        (["--nodes", "3", "experiment=debug/pretrain", "run.seed=1,2"], "--nodes: 3 does not divide the 1 ranks"),
        (
            ["--nodes", "2", "experiment=zhongjing/pretrain", "layout=64gpu"],
            "--nodes: 64 ranks on 2 are 32 GPUs a node, and a node has 8; set --nodes 8, or --gpus-per-node 32",
        ),
    ],
)
def test_jobs_that_do_not_fit_their_nodes_are_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], complaint: str
) -> None:
    root = tmp_path / "sweep"
    with pytest.raises(ConfigError) as caught:
        main(["-m", "--slurm", "--no-files", "--dir", str(root), *words])
    assert complaint in str(caught.value)
    assert not root.exists()


def test_larger_nodes_and_other_cores_can_be_asked_for(tmp_path: Path) -> None:
    def directives(name: str, *words: str) -> str:
        main(["-m", "--slurm", "--no-files", "--dir", str(tmp_path / name), *words])
        return (tmp_path / name / "sweep.sbatch").read_text()

    large = ["--nodes", "4", "experiment=zhongjing/pretrain", "layout=64gpu"]
    text = directives("large", *large, "--gpus-per-node", "16", "--cpus-per-rank", "7")
    assert "#SBATCH --gpus-per-node=16\n#SBATCH --cpus-per-task=112\n" in text
    cpu = ["experiment=debug/pretrain", "world_size=16", "algorithm.global_batch_size=16", "run.device=cpu"]
    text = directives("cpu", *cpu)
    assert "#SBATCH --cpus-per-task=16\n" in text
    assert "gpus-per-node" not in text


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (3, "failed")])
def test_a_slurm_task_runs_its_own_folder_and_records_how_it_ended(tmp_path: Path, code: int, state: str) -> None:
    """The array script under stand-ins for scontrol and srun: task 1 of two."""
    root, fake = tmp_path / "sweep", tmp_path / "bin"
    main(["-m", "--slurm", *DEBUG, "run.seed=1,2", "--dir", str(root)])
    fake.mkdir()
    for name, body in (("scontrol", "echo node0"), ("srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}')):
        (fake / name).write_text(f"#!/bin/bash\n{body}\n")
        (fake / name).chmod(0o755)
    slurm = ["SLURM_ARRAY_TASK_ID=1", "SLURM_JOB_ID=77", "SLURM_JOB_NODELIST=node0", "SLURM_NNODES=1"]
    command = ["env", f"PATH={fake}:/usr/bin:/bin", *slurm, "bash", str(root / "sweep.sbatch")]
    assert subprocess.run(command, check=False).returncode == code
    assert states(root) == {"000_run.seed=1": "waiting", "001_run.seed=2": state}
    called = (tmp_path / "srun.txt").read_text()
    assert "--rdzv-endpoint=node0:20077" in called
    assert called.strip().endswith(f"{' '.join(TRAIN)} {root}/001_run.seed=2/config.yaml")


def test_a_killed_launch_ends_its_workers_and_says_so(tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = f"import sys; from megatron_zj.cli.launch import main; main(sys.argv[1:], train=({str(sleeper)!r},))"
    folder = tmp_path / "run"
    launch = subprocess.Popen([sys.executable, "-c", code, *DEBUG, f"run.dir={folder}"], cwd=ROOT)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    worker = int((tmp_path / "pid").read_text())
    launch.send_signal(signal.SIGTERM)
    assert launch.wait(30) == 128 + signal.SIGTERM
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    wait_for(lambda: not Path(f"/proc/{worker}").exists())


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_the_environment_is_that_of_the_launch_scripts(tmp_path: Path) -> None:
    """``zj launch`` and launch/env.sh set the same variables to the same values."""
    script = f"env -i bash -c 'source {ROOT}/launch/env.sh; env'"
    shown = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout
    variables = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert {
        name: variables[name] for name in variables if name.isupper() and name not in ("PWD", "SHLVL")
    } == ENVIRONMENT
    job = Job.of(0, (), compose_run(["experiment=debug/pretrain"]), 1, tmp_path, swept=False)
    assert torchrun_command(job, TRAIN, 0)[1:4] == [f"{name}={value}" for name, value in ENVIRONMENT.items()]


@pytest.mark.parametrize("name", ["local.sh", "multinode.sh", "slurm.sbatch", "env.sh"])
def test_launch_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "launch" / name)], check=True)


def test_the_plain_slurm_script_gives_a_nodes_ranks_more_than_one_core() -> None:
    text = (ROOT / "launch/slurm.sbatch").read_text()
    assert "#SBATCH --cpus-per-task=32\n" in text
    assert 'srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-32}" ' in text


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("local.sh", ["2"], "--standalone --nproc-per-node 2 --max-restarts 0 -m megatron_zj.cli.train a=1 b=x y"),
        (
            "multinode.sh",
            ["2", "8", "node0:29400"],
            "--nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id zj "
            "--rdzv-endpoint node0:29400 --rdzv-conf join_timeout=1800 -m megatron_zj.cli.train a=1 b=x y",
        ),
    ],
)
def test_launch_scripts_start_torchrun_with_the_overrides(
    script: str, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"\n')
    python.chmod(0o755)
    command = ["env", f"PYTHON={python}", str(ROOT / "launch" / script), *arguments, "a=1", "b=x y"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown == f"1 -m torch.distributed.run {expected}\n"
    refused = subprocess.run([str(ROOT / "launch" / script)], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"launch/{script}" in refused.stderr
