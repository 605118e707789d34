"""Our formulas against TRL 1.12.0's own code, on the tensors that went through it (fixtures/generate_trl.py).

Where definitions agree the values agree within 1e-5.  Where they do not, the difference is stated as a formula and
tested too, so that the table "Against TRL" in docs/rlhf.md is a claim, not a guess.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_zj.algorithms import dpo, shaping
from megatron_zj.algorithms import functional as f
from megatron_zj.algorithms.objectives import PolicyObjective, ValueObjective
from megatron_zj.algorithms.reward import RankedGroups
from megatron_zj.config.algorithm import Aggregation, DPOConfig, PPOConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch, pack
from megatron_zj.engine.objective import Objective
from megatron_zj.roles.world import World, WorldBatch
from megatron_zj.runtime.timers import Timers

FIXTURES = Path(__file__).parent / "fixtures"
TRL = json.loads((FIXTURES / "trl_1_12_0.json").read_text())
CASES = TRL["cases"]
PPO = ("ppo_k1", "ppo_k3")
PROMPT = 1  # tokens before the response in our rows; how many does not matter


def test_the_fixture_is_of_trl_1_12_0() -> None:
    assert TRL["versions"]["trl"] == "1.12.0"


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_installed_trl_still_computes_the_fixture(tmp_path: Path) -> None:
    if metadata.version("trl") != "1.12.0":
        pytest.skip(f"the fixture is of trl 1.12.0, installed is {metadata.version('trl')}")
    made = tmp_path / "trl.json"
    command = [sys.executable, str(FIXTURES / "generate_trl.py"), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    _same(json.loads(made.read_text())["cases"], CASES, "cases")


def _same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            _same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            _same(*pair, f"{where}[{index}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5), where
    else:
        assert one == other, where


# PPO: rewards, advantages, returns ---------------------------------------------------------------------------------


class Iteration:
    """What TRL's PPO collected, as tensors [rows, width], and as rows of ours."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.options = case["options"]
        self.tensors = {
            name: torch.tensor(values)
            for name, values in case.items()
            if isinstance(values, list) and name != "micro_batches"
        }
        self.micro_batches = case["micro_batches"]
        self.lengths = (self.tensors["sequence_lengths"] + 1).tolist()
        self.width = self.tensors["logprobs"].shape[1]
        # TRL gives a response that ended one step more, on the first pad: its score stands there, after a last value.
        self.steps = [min(length + 1, self.width) for length in self.lengths]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, lengths: list[int]) -> Rows:
        """The first ``lengths`` steps of each row behind a prompt."""
        return _rows([self[name][row, :length] for row, length in enumerate(lengths)])

    def mask(self, lengths: list[int]) -> Rows:
        """1 on those steps."""
        return _rows([torch.ones(length, dtype=torch.int64) for length in lengths])


def _rows(responses: list[Tensor]) -> Rows:
    return Rows.of([torch.cat([response.new_zeros(PROMPT), response]) for response in responses])


def _close(one: Tensor | float, other: Tensor | float) -> None:
    torch.testing.assert_close(torch.as_tensor(one).float(), torch.as_tensor(other).float(), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=PPO)
def iteration(request: pytest.FixtureRequest) -> Iteration:
    return Iteration(CASES[request.param])


def _our_rewards(found: Iteration) -> Rows:
    responses = [found.rows(name, found.lengths) for name in ("logprobs", "ref_logprobs")]
    options = found.options
    return f.shape_rewards(
        found["scores"], *responses, found.mask(found.lengths), options["kl_coef"], options["kl_estimator"]
    )


def test_the_penalty_for_a_missing_eos_is_the_same(iteration: Iteration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaping, "world_sum", lambda sums: sums)  # one process, no process group
    config = PPOConfig(missing_eos_penalty=iteration.options["missing_eos_penalty"], whiten_scores=False)
    lengths, unended = torch.tensor(iteration.lengths), torch.tensor([0, 7])
    truncated = torch.zeros(len(lengths), dtype=torch.bool).index_fill(0, unended, True)
    tokens = iteration.mask(iteration.lengths)
    tokens = tokens.replace(torch.arange(len(tokens.values)))  # no two answers are the same
    samples = Batch(tokens, {}, {"truncated": truncated})
    ours = shaping.Shaping(config, shaping.ScoreScale(), str)(iteration["raw_scores"], samples)
    _close(ours, iteration["scores"])


def test_rewards_agree_but_for_the_step_that_bears_the_score(iteration: Iteration) -> None:
    ours = _our_rewards(iteration).split()
    for row, length in enumerate(iteration.lengths):
        theirs = iteration["rewards"][row]
        _close(ours[row][PROMPT : PROMPT + length - 1], theirs[: length - 1])  # the KL of both estimators
        if length == iteration.width:
            _close(ours[row][-1], theirs[-1])
        else:  # KL on the last token, the score on the pad behind it
            _close(ours[row][-1], theirs[length - 1] + theirs[length])
            _close(theirs[length], iteration["scores"][row])
        assert not theirs[length + 1 :].any()


def test_advantages_and_returns_agree_on_the_same_steps(iteration: Iteration) -> None:
    steps = iteration.steps
    rewards, values = iteration.rows("rewards", steps), iteration.rows("values", steps)
    ours = f.response_advantages(
        rewards, values, iteration.mask(steps), iteration.options["gamma"], iteration.options["lam"]
    )
    for name, found in zip(("advantages", "returns"), ours, strict=True):
        _close(found.values, iteration.rows(name, steps).values)


def _ours_from_the_scores(found: Iteration) -> tuple[Rows, Rows]:
    values, mask = found.rows("values", found.lengths), found.mask(found.lengths)
    return f.response_advantages(_our_rewards(found), values, mask, found.options["gamma"], found.options["lam"])


def test_where_the_score_stands_does_not_matter_at_gamma_1_and_lambda_1() -> None:
    found = Iteration(CASES["ppo_k1"])
    assert found.options["gamma"] == found.options["lam"] == 1.0
    advantages, returns = _ours_from_the_scores(found)
    _close(advantages.values, found.rows("advantages", found.lengths).values)
    _close(returns.values, found.rows("returns", found.lengths).values)


def test_below_1_it_matters_in_responses_that_ended_early_alone() -> None:
    found = Iteration(CASES["ppo_k3"])
    theirs = found.rows("advantages", found.lengths).split()
    for row, ours in enumerate(_ours_from_the_scores(found)[0].split()):
        if found.lengths[row] == found.width:
            _close(ours, theirs[row])
        else:
            assert (ours - theirs[row]).abs().max() > 1e-2


def test_whitening_differs_by_the_unbiased_deviation_alone(iteration: Iteration) -> None:
    """TRL divides by the deviation with n - 1; we by the population's, with n."""
    keep = torch.arange(iteration.width)[None] < torch.tensor(iteration.lengths)[:, None]
    mean, deviation = f.mean_and_deviation(f.masked_sums(iteration["advantages"], keep))
    ours = f.whiten(iteration["advantages"], keep, mean, deviation)
    count = int(keep.sum())
    _close(ours[keep] * math.sqrt((count - 1) / count), iteration["whitened"][keep])


# PPO: losses -------------------------------------------------------------------------------------------------------


def _packed(fields: dict[str, Tensor], lengths: list[int], aggregation: Aggregation = "token") -> PackedBatch:
    """One pack of rows whose fields [rows, width] count on the first ``lengths`` steps."""
    columns = {
        name: _rows([row[:length] for row, length in zip(values, lengths, strict=True)])
        for name, values in fields.items()
    }
    mask = _rows([torch.ones(length, dtype=torch.int64) for length in lengths])
    tokens = mask.replace(torch.zeros_like(mask.values))
    return pack(Batch(tokens, columns | f.aggregation_fields(mask, aggregation)), range(len(lengths)))


def _mean(objective: Objective, output: str, packed: PackedBatch) -> dict[str, Tensor]:
    """The objective's loss and metrics, both by its weight, where the model gave ``packed.per_token['output']``."""
    terms, weight = objective({output: packed.per_token["output"]}, packed), objective.weight(packed)
    return {name: value / weight for name, value in {"loss": terms.loss, **terms.metrics}.items()}


def _policy(found: Iteration, one: dict[str, Any]) -> tuple[dict[str, Tensor], list[int]]:
    names = {"output": "new_logprobs", "old_logprobs": "mb_logprobs", "advantages": "mb_advantage"}
    fields = {ours: torch.tensor(one[theirs]) for ours, theirs in names.items()}
    return fields, [found.lengths[row] for row in one["rows"]]


def test_policy_losses_agree_for_every_micro_batch(iteration: Iteration) -> None:
    objective, clipped = PolicyObjective(1.0, iteration.options["cliprange"]), 0.0
    for one in iteration.micro_batches:
        ours = _mean(objective, "logprobs", _packed(*_policy(iteration, one)))
        _close(ours["loss"], one["pg_loss"])
        _close(ours["clip_fraction"], one["pg_clipfrac"])
        clipped += one["pg_clipfrac"]
    assert clipped > 0  # the second epoch leaves the range, or nothing was tested


def test_value_losses_agree_on_the_same_steps(iteration: Iteration) -> None:
    objective, clipped = ValueObjective(iteration.options["cliprange_value"]), 0.0
    names = {"output": "vpred", "old_values": "mb_values", "returns": "mb_return"}
    for one in iteration.micro_batches:
        fields = {ours: torch.tensor(one[theirs]) for ours, theirs in names.items()}
        ours = _mean(objective, "values", _packed(fields, [iteration.steps[row] for row in one["rows"]]))
        _close(ours["loss"], one["vf_loss"])
        _close(ours["clip_fraction"], one["vf_clipfrac"])
        clipped += one["vf_clipfrac"]
    assert clipped > 0


def test_a_minibatch_is_one_mean_here_and_a_mean_of_micro_batch_means_there(iteration: Iteration) -> None:
    objective = PolicyObjective(1.0, iteration.options["cliprange"])
    parts = [_policy(iteration, one) for one in iteration.micro_batches[-2:]]
    fields = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    ours = _mean(objective, "logprobs", _packed(fields, parts[0][1] + parts[1][1]))["loss"]
    theirs = torch.tensor([one["pg_loss"] for one in iteration.micro_batches[-2:]])
    tokens = torch.tensor([float(sum(part[1])) for part in parts])
    _close(ours, (theirs * tokens).sum() / tokens.sum())


# GRPO, DPO, reward model -------------------------------------------------------------------------------------------


def _grpo(case: dict[str, Any], aggregation: Aggregation) -> tuple[PackedBatch, dict[str, Tensor]]:
    mask = torch.tensor(case["completion_mask"])
    fields = {
        "output": torch.tensor(case["per_token_logps"]),
        "old_logprobs": torch.tensor(case["old_per_token_logps"]),
        "ref_logprobs": torch.tensor(case["ref_per_token_logps"]),
        "advantages": torch.tensor(case["advantages"])[:, None].expand(mask.shape),
    }
    options = case["options"]
    objective = PolicyObjective(1.0, options["epsilon"], options["epsilon_high"], kl_coef=options["beta"])
    packed = _packed(fields, mask.sum(1).tolist(), aggregation)
    return packed, _mean(objective, "logprobs", packed)


@pytest.mark.parametrize(("loss_type", "aggregation"), [("grpo", "sequence"), ("bnpo", "token")])
def test_grpo_losses_agree(loss_type: str, aggregation: Aggregation) -> None:
    case = CASES["grpo"][loss_type]
    _, ours = _grpo(case, aggregation)
    _close(ours["loss"], case["loss"])
    assert ours["clip_fraction"] > 0


def test_grpo_differs_by_the_correction_of_the_kl_where_trl_makes_it() -> None:
    """``use_bias_correction_kl``, on by default there: the KL term is multiplied with the ratio to the old policy."""
    case = CASES["grpo_corrected"]
    packed, ours = _grpo(case, "token")
    new, old = packed.per_token["output"], packed.per_token["old_logprobs"]
    extra = f.estimate_kl(new, packed.per_token["ref_logprobs"], "k3") * ((new - old).exp() - 1.0)
    weight = packed.per_token["loss_weight"]
    _close(ours["loss"] + case["options"]["beta"] * (extra * weight).sum() / weight.sum(), case["loss"])


def test_group_advantages_agree_but_for_the_constant_under_the_deviation() -> None:
    for kind, scale in (("none", False), ("group", True)):
        case = CASES["grpo_advantages"][kind]
        rewards = torch.tensor(case["rewards"])
        ours = f.group_advantages(rewards, 4, scale)
        deviation = rewards.view(-1, 4).std(1).repeat_interleave(4)
        factor = (deviation + 1e-6) / (deviation + 1e-4) if scale else torch.ones(())
        _close(ours * factor, torch.tensor(case["advantages"]))


class Fixed:
    """A role whose log-probabilities are given."""

    def __init__(self, logprobs: Rows) -> None:
        self.logprobs = logprobs

    def infer(self, want: str, batch: object, *, at: str) -> Fixed:
        return self

    def wait(self) -> Rows:
        return self.logprobs


class Once:
    """A stream of one batch."""

    num_units = 4

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def test_dpo_loss_and_rewards_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["dpo"]
    lengths = torch.tensor(case["completion_mask"]).sum(1).tolist()
    logps, ref = (
        [torch.tensor(row)[:length] for row, length in zip(case[name], lengths, strict=True)]
        for name in ("logps", "ref_logps")
    )
    half = len(lengths) // 2  # TRL: all chosen, then all rejected
    mask = _rows([torch.ones(length, dtype=torch.int64) for length in lengths])
    per_row = {
        "group": torch.arange(half).repeat(2),
        "rank": torch.tensor([0] * half + [1] * half),
        "prompt_length": torch.full((2 * half,), PROMPT),
    }
    batch = Batch(mask, {}, per_row)
    monkeypatch.setattr(dpo, "world_sum", lambda sums: sums.detach())  # one process, no process group
    monkeypatch.setattr(WorldBatch, "gather", classmethod(lambda cls, local: cls(local, ())))
    config = DPOConfig(global_batch_size=half, beta=case["beta"])
    roles: tuple[Any, Any] = (Fixed(_rows(logps)), Fixed(_rows(ref)))
    stream = Once(batch)
    found = dpo.DPO(config, *roles, stream, World(0, 1), Timers(torch.device("cpu")), stream).evaluate()
    _close(found["loss"], case["loss"])
    for ours, theirs in (("margin", "margins"), ("reward_better", "chosen"), ("reward_worse", "rejected")):
        _close(found[ours], case["rewards"][theirs])


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("loss", RankedGroups()),
        ("loss_margin", RankedGroups(margin=CASES["reward"]["margin"])),
        # TRL penalises (better + worse)^2, we the square of their mean
        ("loss_centered", RankedGroups(centering=4.0 * CASES["reward"]["center_rewards_coefficient"])),
    ],
)
def test_reward_model_losses_agree(name: str, objective: RankedGroups) -> None:
    scores = torch.tensor(CASES["reward"]["scores"])
    half = len(scores) // 2
    per_row = {"group": torch.arange(half).repeat(2), "rank": torch.tensor([0] * half + [1] * half)}
    packed = pack(Batch(Rows.of([[3, 4]] * len(scores)), {}, per_row), range(len(scores)))
    terms = objective({"scores": scores}, packed)
    _close(terms.loss / objective.weight(packed), CASES["reward"][name])
