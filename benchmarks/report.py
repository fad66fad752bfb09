"""How the benchmarks tell what they found: a line per row, and the same as CSV."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path


def report(
    heading: str,  # unit and conditions
    rows: dict[str, list[float]],  # name -> a value per round
    out: Path | None,  # CSV to write; None: none
    unit: str = "",  # appended to the column names, for example "_us"
) -> None:
    "Print median, lowest and highest of every row, and write them down"
    found = {name: (statistics.median(v), min(v), max(v)) for name, v in rows.items()}
    print(heading)
    for name, (median, low, high) in found.items():
        print(f"  {name:24s} {median:9.3f}   ({low:.3f} to {high:.3f})")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["row", f"median{unit}", f"low{unit}", f"high{unit}"])
            writer.writerows([name, *(round(x, 3) for x in values)] for name, values in found.items())
