"""Time the kernels: ``python -m kernels.bench [ops] [--plot]`` and ``python -m kernels.bench tune``.

On CUDA each op is timed against what is found in the environment (torch eager, torch.compile, SDPA, Liger) and against
ceilings measured in the same run: copy bandwidth and a square bf16 GEMM.  On a CPU the torch path of each op is timed
against its naive form.  An op whose check is red is not timed.  The table ends with each op beside its rivals: times
and peak memory, and their ratios.  Results go to JSON, with the fingerprint of the source and blocks they belong to.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch._functorch import config as functorch

from kernels import dispatch, shapes
from kernels.shapes import Case, split_form

Run = Callable[[], object]
OPS = ("attention", "decode_attention", "rms_norm", "rope", "swiglu", "linear_logprob", "reward_head", "ranking_loss",
       "value_head", "gae")  # fmt: skip
CACHE_BYTES = 256 << 20  # written between runs so that no input is still in a cache
LONGEST = 3000.0  # milliseconds after which a form is not run again, once it has run three times


@dataclass(frozen=True)
class Timing:
    """One form of one op on one shape."""

    op: str
    shape: str
    form: str  # "ours", or the alternative
    milliseconds: float  # median; on a CPU the processor's time (summed over threads), which other programs leave alone
    rate: float  # GB/s or TFLOP/s
    unit: str
    percent: float | None  # of the ceiling measured in the same run; None: on a CPU
    peak_mib: float  # of tensors, beyond those that were there, MiB


@dataclass(frozen=True)
class Comparison:
    """One op on one shape beside an alternative: a ratio above 1 is in our favour."""

    op: str
    shape: str
    way: str  # "forward", "backward", "both"; "" where there is no backward pass
    rival: str
    milliseconds: tuple[float, float]  # ours, the rival's
    times_faster: float
    peak_mib: tuple[float, float]  # ours, the rival's
    times_less_memory: float


class Stopwatch:
    """Median times on a device, caches flushed on CUDA."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.flush = torch.empty(CACHE_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)

    def milliseconds(self, run: Run) -> float:
        """The median over ``repeats`` runs (three or more where they are long), after two warm ones."""
        for _ in range(2):
            warm = self._once(run)
        enough = max(3, int(LONGEST / max(warm, 1e-3)))
        return statistics.median(self._once(run) for _ in range(min(self.repeats, enough)))

    def _once(self, run: Run) -> float:
        if self.device.type != "cuda":
            started = time.process_time()
            run()
            return (time.process_time() - started) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def peak_mib(self, run: Run) -> float:
        """Memory of tensors a run takes beyond what is allocated already, MiB."""
        if self.device.type != "cuda":
            with torch.autograd.profiler.profile(profile_memory=True) as profiler:
                run()
            steps = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
            sizes = (event.nbytes() for event in sorted(steps, key=lambda event: event.start_ns()))
            return max(itertools.accumulate(sizes), default=0) / 2**20
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(watch: Stopwatch) -> dict[str, float]:
    """Copy bandwidth, GB/s, and the rate of a square bf16 GEMM, TFLOP/s, of this device now."""
    if watch.device.type != "cuda":
        return {}
    source = torch.empty(1 << 30, dtype=torch.int8, device=watch.device)
    target = torch.empty_like(source)
    copy = watch.milliseconds(lambda: target.copy_(source))
    side = 8192
    a = torch.randn(side, side, dtype=torch.bfloat16, device=watch.device)
    gemm = watch.milliseconds(lambda: a @ a)
    return {"GB/s": 2 * source.numel() / copy / 1e6, "TFLOP/s": 2 * side**3 / gemm / 1e9}


def time_case(case: Case, watch: Stopwatch, ceiling: Mapping[str, float], without: Sequence[str] = ()) -> list[Timing]:
    """Every form of one case but these; a form that fails is left out with its reason on standard error.

    A backward pass is timed over one graph, built before the clock starts and kept from run to run.
    """
    found = []
    for form in (*case.forms, *case.backward):
        name, way = split_form(form)
        if name in without:
            continue
        try:
            # What torch.compile gives away for good after one backward pass cannot be run again.
            with functorch.patch(donated_buffer=False):
                run = case.backward[form]() if form in case.backward else case.forms[form]
                elapsed = watch.milliseconds(run)
                peak = watch.peak_mib(run)
        except (RuntimeError, NotImplementedError) as error:
            sys.stderr.write(f"{case.op} {case.shape} {form}: {str(error).splitlines()[0][:120]}\n")
            continue
        rate = case.work[way] / elapsed / (1e6 if case.unit == "GB/s" else 1e9)
        percent = 100 * rate / ceiling[case.unit] if case.unit in ceiling else None
        found.append(Timing(case.op, case.shape, form, elapsed, rate, case.unit, percent, peak))
    return found


def check(case: Case, form: str) -> str | None:
    """None where this form's outputs and gradients are close to plain torch's in fp32; else what is wrong."""
    try:
        ours, plain = case.verify[form]()
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    for index, (mine, theirs) in enumerate(zip(ours, plain, strict=True)):
        off = float((mine.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-20))
        if not off < case.tolerance:
            return f"result {index} of {len(ours)} differs by {off:.1e}, allowed {case.tolerance:.0e}"
    return None


def line(timing: Timing) -> str:
    """One row of the printed table."""
    percent = "" if timing.percent is None else f"{timing.percent:5.1f} %"
    peak = f"{timing.peak_mib:9.1f} MiB"
    times = f"{timing.milliseconds:10.3f} ms {timing.rate:10.4g} {timing.unit:<7}"
    return f"{timing.op:<22} {timing.shape:<34} {timing.form:<14} {times} {percent} {peak}".rstrip() + "\n"


def side_by_side(timings: Sequence[Timing]) -> list[Comparison]:
    """Our default form of each op, shape and pass beside every other form of the same."""
    found = []
    ours = {(t.op, t.shape, way): t for t in timings for name, way in [split_form(t.form)] if name == "ours"}
    for timing in timings:
        rival, way = split_form(timing.form)
        own = ours.get((timing.op, timing.shape, way))
        if own is None or own is timing:
            continue
        faster = timing.milliseconds / own.milliseconds
        less = max(timing.peak_mib, 1e-3) / max(own.peak_mib, 1e-3)
        times, peaks = (own.milliseconds, timing.milliseconds), (own.peak_mib, timing.peak_mib)
        found.append(Comparison(timing.op, timing.shape, way, rival, times, faster, peaks, less))
    return found


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """One line a comparison: our time and memory, the rival's, and how many times better ours are."""
    head = f"{'op':<17} {'shape':<30} {'pass':<8} {'rival':<10}"
    lines = [f"{head} {'ours ms':>9} {'rival ms':>9} {'faster':>7} {'ours MiB':>9} {'rival MiB':>9} {'less':>7}"]
    for c in comparisons:
        times = f"{c.milliseconds[0]:9.2f} {c.milliseconds[1]:9.2f} {c.times_faster:6.2f}x"
        peaks = f"{c.peak_mib[0]:9.1f} {c.peak_mib[1]:9.1f} {c.times_less_memory:6.2f}x"
        lines.append(f"{c.op:<17} {c.shape:<30} {c.way:<8} {c.rival:<10} {times} {peaks}")
    return "\n".join(lines) + "\n"


def bench(ops: Sequence[str], device: torch.device, repeats: int) -> tuple[list[Timing], dict[str, float], list[str]]:
    """All cases of these ops (none: of all); the timings, the ceilings and the red ops."""
    watch = Stopwatch(device, repeats)
    ceiling = ceilings(watch)
    timings: list[Timing] = []
    red: list[str] = []
    for case in shapes.cases(device):
        if ops and case.op not in ops:
            continue
        wrong = {form: why for form in case.verify if (why := check(case, form)) is not None}
        for form, why in wrong.items():
            red.append(case.op)
            sys.stdout.write(f"{case.op:<22} {case.shape:<34} {form:<14} RED, not timed: {why}\n")
        if "ours" in wrong:
            continue
        for timing in time_case(case, watch, ceiling, tuple(wrong)):
            timings.append(timing)
            sys.stdout.write(line(timing))
    return timings, ceiling, red


def report(timings: Sequence[Timing], ceiling: Mapping[str, float], device: torch.device) -> dict[str, Any]:
    """What goes to JSON: enough to say later whether a number is stale."""
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ceilings": dict(ceiling),
        "timings": [asdict(timing) for timing in timings],
        "side by side": [asdict(comparison) for comparison in side_by_side(timings)],
    }
    if device.type == "cuda" and dispatch.has_triton():
        configs = importlib.import_module("kernels.configs")
        fingerprint = importlib.import_module("kernels.fingerprint")
        resources = importlib.import_module("kernels.resources")
        arch = configs.architecture(device)
        record["triton"] = importlib.import_module("triton").__version__
        record["arch"] = arch
        record["hashes"] = {
            label: fingerprint.timing_hash(entry, arch) for label, entry in resources.by_label().items()
        }
        record["cubins"] = {record["triton"]: resources.cubins(arch)}
    return record


def plot(timings: Sequence[Timing], path: Path) -> None:
    """Bars of every form, grouped by op and shape, as an SVG file: longer is faster."""
    rows: list[str] = []
    best = {unit: max(timing.rate for timing in timings if timing.unit == unit) for unit in {t.unit for t in timings}}
    for index, timing in enumerate(timings):
        y, width = 24 + 20 * index, 420 * timing.rate / best[timing.unit]
        colour = "#2a6f97" if timing.form.startswith("ours") else "#a9a9a9"
        label = escape(f"{timing.op}  {timing.shape}  {timing.form}")
        rows.append(f'<text x="500" y="{y + 12}" text-anchor="end">{label}</text>')
        rows.append(f'<rect x="510" y="{y}" width="{width:.1f}" height="15" fill="{colour}"/>')
        rows.append(f'<text x="{515 + width:.1f}" y="{y + 12}">{timing.rate:.4g} {timing.unit}</text>')
    size = f'width="1100" height="{40 + 20 * len(timings)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    path.write_text("\n".join([head, *rows, "</svg>"]) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where an op is red."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops to time (default: all), or the single word 'tune'")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON file (default: bench.json)")
    parser.add_argument("--plot", type=Path, help="also draw bars into this SVG file")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each form (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arch", default="sm_90", help="tune: the architecture (default: sm_90)")
    chosen = parser.parse_args(arguments)
    if chosen.ops == ["tune"]:
        tune = importlib.import_module("kernels.tune")
        sys.stdout.write(json.dumps(tune.propose(chosen.arch), indent=1) + "\n")
        return 0
    if unknown := set(chosen.ops) - set(OPS):
        parser.error(f"unknown ops {sorted(unknown)}; known: {sorted(OPS)}")
    device = torch.device(chosen.device)
    timings, ceiling, red = bench(chosen.ops, device, chosen.repeats)
    sys.stdout.write("\n" + comparison_table(side_by_side(timings)))
    chosen.out.write_text(json.dumps(report(timings, ceiling, device), indent=1), encoding="utf-8")
    if chosen.plot:
        plot(timings, chosen.plot)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
