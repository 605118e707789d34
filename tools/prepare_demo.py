"""Write the data of the demo: python tools/prepare_demo.py --to runs/demo/data [--seed 0]

The clinic is written for testing software and is no medical advice.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_zj.evaluation.clinic.files import DemoSizes, write_demo


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    for size in fields(DemoSizes):
        flag = f"--{size.name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=size.default, metavar="N", help=f"records (default {size.default})")
    arguments = parser.parse_args()
    sizes = DemoSizes(**{size.name: getattr(arguments, size.name) for size in fields(DemoSizes)})
    for name, count in write_demo(arguments.to, arguments.seed, sizes).items():
        print(f"{arguments.to / name}: {count} records")


if __name__ == "__main__":
    main()
