"""How the benchmarks tell what they found: a line per row, and the same as CSV. The interval is that of the median over rounds, from the bootstrap that reports of runs use."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import numpy as np

from fastrl_pipes.functional.aggregates import bootstrap_interval


def report(
    heading: str,  # unit and conditions
    rows: dict[str, list[float]],  # name -> a value per round
    out: Path | None,  # CSV to write; None: none
    unit: str = "",  # appended to the column names, for example "_us"
) -> None:
    "Print median, lowest and highest of every row and the 95% interval of the median, and write them down"
    found = {name: (statistics.median(v), min(v), max(v), *_interval(v)) for name, v in rows.items()}
    print(heading)
    for name, (median, low, high, *interval) in found.items():
        sure = f"   95% [{interval[0]:.3f}, {interval[1]:.3f}]" if interval[0] is not None else ""
        print(f"  {name:24s} {median:9.3f}   ({low:.3f} to {high:.3f}){sure}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["row", f"median{unit}", f"low{unit}", f"high{unit}", f"interval_low{unit}", f"interval_high{unit}"])
            writer.writerows([name, *("" if x is None else round(x, 3) for x in values)] for name, values in found.items())


def _interval(values):
    "Of the median; one round says nothing of others"
    return tuple(float(x) for x in bootstrap_interval(values, statistic=np.median)) if len(values) > 1 else (None, None)
