"""Run by test_triton.py in a process of its own: a LLaMA on the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from kernels import dispatch
from tests.models.layouts import TINY, Case, compare

# One layer; the smallest heads that fill a tile of the attention kernels, 16 channels.
MODEL = replace(TINY, num_layers=1, hidden_size=64, kernels="triton")


def main(head: str) -> None:
    """One training step of two packs, compared with the reference; the result as JSON on the last line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=120))
        with dispatch.record_launches() as launches:
            outcome = compare(Case(head, model=MODEL, head=head), 1)  # type: ignore[arg-type]
        dist.destroy_process_group()
    result = {"outputs": outcome.outputs, "gradients": outcome.gradients, "launches": dict(launches)}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
