"""Chance that can be had again."""

from __future__ import annotations

import os
import random
import time

VARIABLE = "ZJ_TEST_SEED"


def chance() -> random.Random:
    """Another one at every call, unless ``ZJ_TEST_SEED`` says which; a failing test shows the seed."""
    seed = int(os.environ.get(VARIABLE) or time.time_ns())
    print(f"{VARIABLE}={seed} draws the same again")
    return random.Random(seed)
