"""Write the data of the demo: python tools/prepare_demo.py --to runs/demo/data [--seed 0]

The clinic is written for testing software and is no medical advice.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_zj.evaluation.clinic.conditions import NOTICE
from megatron_zj.evaluation.clinic.files import EVALUATION_FILES, TRAINING_FILES, DemoSizes, write_demo


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    for size in fields(DemoSizes):
        flag = f"--{size.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=count, default=size.default, metavar="N", help=f"records (default {size.default})"
        )
    arguments = parser.parse_args()
    sizes = DemoSizes(**{size.name: getattr(arguments, size.name) for size in fields(DemoSizes)})
    try:
        refuse_foreign(arguments.to)
        written = write_demo(arguments.to, arguments.seed, sizes)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name, records in written.items():
        print(f"{arguments.to / name}: {records} records")


def count(text: str) -> int:
    """A number of records."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return int(text)


def refuse_foreign(folder: Path) -> None:
    """ValueError where a file would be overwritten that is not all from here: each of our records has the notice."""
    for path in (folder / name for name in (*TRAINING_FILES, *EVALUATION_FILES, "README.md")):
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        records = filter(str.strip, text.split("\n")) if path.suffix == ".jsonl" else [text]
        if not all(NOTICE in record for record in records):
            raise ValueError(f"{path} is not, or not only, the demo's, and stays as it is; give another --to")


if __name__ == "__main__":
    main()
