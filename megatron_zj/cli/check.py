"""``zj check``: is this configuration one that can run?  Needs no GPU and starts nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megatron_zj.algorithms.rules import unknown_rules
from megatron_zj.cli.compose import compose_run, experiments, frozen_text, load_frozen
from megatron_zj.cli.main import entry
from megatron_zj.config.algorithm import OnPolicyConfig
from megatron_zj.config.checks import Finding, check, missing_inputs
from megatron_zj.config.data import CorpusConfig
from megatron_zj.config.derived import (
    Block,
    engine_of,
    head_of,
    is_trained,
    longest_row,
    optimizer_steps,
    placements,
    roles,
    rows_per_update,
    sampling_of,
)
from megatron_zj.config.run import RunConfig
from megatron_zj.models.flops import memory_estimate, parameters, resume_bytes
from megatron_zj.parallel.grid import AXES, RankGrid

_GIB = 2**30
_MAX_GROUPS = 4  # groups of an axis that are written out


def main(argv: Sequence[str]) -> int:
    """Print what the run would be and what is wrong with it.  Returns 0 when nothing is."""
    parser = argparse.ArgumentParser(
        prog="zj check", description="Validate a configuration without running it.", epilog=experiments()
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="experiment=zhongjing/pretrain world_size=64")
    parser.add_argument("--config", type=Path, help="a resolved configuration file instead of overrides")
    parser.add_argument("--no-files", action="store_true", help="do not look for input files")
    parser.add_argument("--elsewhere", action="store_true", help="for another machine: no look at files and packages")
    parser.add_argument("--show", action="store_true", help="print the resolved configuration too")
    options = parser.parse_intermixed_args(argv)
    if options.config is not None and options.overrides:
        parser.error("give either --config or key=value overrides")
    config = load_frozen(options.config) if options.config is not None else compose_run(options.overrides)
    if options.show:
        sys.stdout.write(frozen_text(config) + "\n")
    findings = check(config, files=not (options.no_files or options.elsewhere), here=not options.elsewhere)
    if isinstance(config.algorithm, OnPolicyConfig):
        findings += [Finding(key=key, message=what) for key, what in unknown_rules(config.algorithm.rules).items()]
    errors = [finding for finding in findings if finding.level == "error"]
    sys.stdout.write(describe(config))
    sys.stdout.write(_findings(findings, missing_inputs(config)))
    sys.stdout.write(f"{len(errors)} error{'s' if len(errors) != 1 else ''}\n" if errors else "ok\n")
    return 1 if errors else 0


def describe(config: RunConfig) -> str:
    """The run in a few lines: what is learned, the grid, the arithmetic of a step, memory a rank."""
    model, algorithm = config.model, config.algorithm
    grouped = "" if model.kv_heads == model.num_attention_heads else f" ({model.kv_heads} key/value)"
    shape = (
        f"{_count(parameters(model))} parameters, {model.num_layers} layers x {model.hidden_size}, "
        f"{model.num_attention_heads} heads{grouped}, {model.padded_vocab_size:,} vocabulary rows "
        f"({model.vocab_size:,} used)"
    )
    lines = [
        f"run        {algorithm.kind} on {config.data.kind}, {config.run.num_steps:,} steps "
        f"({optimizer_steps(config):,} optimizer steps a model), seed {config.run.seed}, in {config.run.dir}",
        f"model      {model.preset or 'custom'}: {shape}, {config.engine.precision}",
    ]
    blocks = placements(config)
    if all(_fits(config, block) for block in blocks):
        for block in blocks:
            lines += [*_grid(block), *_batch(config, block), *_memory(config, block)]
    return "\n".join(lines) + "\n"


def _count(number: int) -> str:
    """``13.0B``, ``1.9M``."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _fits(config: RunConfig, block: Block) -> bool:
    """Whether there is a grid to describe; ``check`` says what is wrong where there is none."""
    size, inside = block.parallel.model_size, block.first_rank + block.num_ranks <= (config.world_size or 1)
    return block.num_ranks >= size and block.num_ranks % size == 0 and block.first_rank >= 0 and inside


def _grid(block: Block) -> list[str]:
    grid = RankGrid.from_config(block.parallel, block.first_rank, block.num_ranks)
    sizes = " x ".join(f"{axis} {grid.sizes[axis]}" for axis in AXES)
    vpp = f", {block.parallel.vpp} chunks a stage" if block.parallel.vpp > 1 else ""
    sequence = ", sequence parallel" if block.parallel.sequence_parallel else ""
    lines = [
        f"placement  {block.name}: ranks {block.first_rank}-{block.first_rank + block.num_ranks - 1} = {sizes}"
        f"{vpp}{sequence}; holds {', '.join(block.roles)}"
    ]
    for axis in reversed(AXES):
        if grid.sizes[axis] > 1:
            groups = grid.groups(axis)
            shown = " ".join(_ranks(group) for group in groups[:_MAX_GROUPS])
            more = f" ... ({len(groups)} groups)" if len(groups) > _MAX_GROUPS else ""
            lines.append(f"  {axis:<8} {shown}{more}")
    return lines


def _ranks(group: tuple[int, ...]) -> str:
    """``[0-3]``, ``[0,4,..,60]``."""
    if len(group) > 2 and group == tuple(range(group[0], group[-1] + 1)):
        return f"[{group[0]}-{group[-1]}]"
    if len(group) > 4:
        return f"[{group[0]},{group[1]},..,{group[-1]}]"
    return f"[{','.join(str(rank) for rank in group)}]"


def _batch(config: RunConfig, block: Block) -> list[str]:
    key, units = rows_per_update(config)
    longest = longest_row(config)
    ranked = config.data.kind == "preference"
    what = {"corpus": "rows", "chat": "dialogues", "preference": "ranked prompts", "prompts": "samples"}[
        config.algorithm.data_kind
    ]
    exactly = "" if isinstance(config.data, CorpusConfig) else "at most "
    share = f"{units / block.dp:g}" if units % block.dp else f"{units // block.dp}"
    tokens = "" if ranked else f", {exactly}{units * longest:,} tokens"
    lines = [
        f"  step     {key} = {units} {what} over dp {block.dp} = {share} a rank{tokens}; a row is {exactly}{longest} "
        f"tokens, a micro-batch {config.engine.micro_batch_tokens:,}"
    ]
    algorithm = config.algorithm
    if isinstance(algorithm, OnPolicyConfig) and sampling_of(config) is not None:
        lines.append(
            f"  rollout  {algorithm.prompts_per_step} prompts x {algorithm.samples_per_prompt} = "
            f"{algorithm.num_samples} samples, {algorithm.epochs} x {algorithm.updates_per_step // algorithm.epochs} "
            "updates"
        )
    return lines


def _memory(config: RunConfig, block: Block) -> list[str]:
    """An estimate for the fullest rank, in the phase that needs most: the models that stay on the device, the one whose
    turn it is, and what it works with.
    """
    known = roles(config)
    lines, kept, working, stays = [], dict[str, int](), dict[str, int](), 0
    for name in block.roles:
        engine, head = engine_of(config, known[name]), head_of(config, name)
        one = memory_estimate(config.model, head, block.parallel, engine, block.dp, trainable=is_trained(config, name))
        whole = one.weights + one.gradients + one.optimizer
        stays += 0 if engine.offload_idle else whole
        kept[name], working[name] = whole if engine.offload_idle else 0, one.activations
        lines.append(f"  memory   {name}: {one.describe()}")
    if isinstance(config.algorithm, OnPolicyConfig) and sampling_of(config) is not None and "actor" in block.roles:
        cache = _cache_bytes(config, config.algorithm, block)
        working["actor"] = max(working["actor"], cache)
        lines.append(f"  memory   actor's key/value cache in rollouts: {cache / _GIB:.2f} GiB")
    if len(lines) > 1:
        overlaps = {name for name in block.roles if engine_of(config, known[name]).overlap_offload}
        largest = stays + largest_phase(kept, working, overlaps)
        what = "models, and the largest phase"
        if len(block.roles) > 1 and any(kept.values()):
            what = "the largest phase; engine.offload_idle keeps idle models on the host"
        lines.append(f"  memory   together {largest / _GIB:.2f} GiB a rank: {what}")
    sharded = [n for n in block.roles if is_trained(config, n) and engine_of(config, known[n]).distributed_optimizer]
    if sharded:
        host = max(resume_bytes(config.model, head_of(config, name), block.parallel) for name in sharded)
        lines.append(f"  memory   of the host to resume: {host / _GIB:.2f} GiB for each rank of a node")
    return lines


def largest_phase(kept: Mapping[str, int], working: Mapping[str, int], overlaps: Collection[str]) -> int:
    """Bytes when some role computes: its model and what it works with; of those that overlap, one that leaves and one
    that comes.
    """
    phases = (
        size + working[name] + sum(sorted(kept[other] for other in overlaps if other != name)[-2:])
        for name, size in kept.items()
    )
    return max(phases, default=0)


def _cache_bytes(config: RunConfig, algorithm: OnPolicyConfig, block: Block) -> int:
    """Keys and values of every row that is decoded at once, at full length, on one rank."""
    model, parallel = config.model, block.parallel
    rows = min(
        algorithm.sampling.max_batch_rows,
        -(-algorithm.num_samples // block.dp),
    )
    size = 4 if engine_of(config, roles(config)["actor"]).precision == "fp32" else 2
    per_token = 2 * model.num_layers * model.kv_heads * model.head_size * size
    return rows * longest_row(config) * per_token // (parallel.tp * parallel.pp)


def _findings(findings: Sequence[Finding], missing: Sequence[Finding]) -> str:
    lines = [f"note       {finding}" for finding in findings if finding.level == "note"]
    lines += [f"to give    {finding}" for finding in missing]
    lines += [f"ERROR      {finding}" for finding in findings if finding.level == "error"]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(entry("check", sys.argv[1:]))
