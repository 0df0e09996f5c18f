"""Evaluation: beside a bare Dask sum of the same Zarr store, and beside LossAccumulator.

    python benchmarks/evaluate.py [--rows 10000000] [--scratch FOLDER] [--out benchmarks/results]

- ``zarr``: rows x 10 float32 and int64 labels, in chunks of 1e6 rows, with Zarr's own compression
  and without. The bare sum adds up the scores, and reads no labels.
- ``classes``: 1,000 rows of 1e5 classes in memory, beside one ``LossAccumulator.update``.

Each figure is the median of the repetitions, in which the methods take turns. The default writes
1 GB; 1e8 rows write 10 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from dask_growth import machine, make_store, open_store

import mml_arrayapi as mml

RESULTS = Path(__file__).parent / "results"


def timed(repeats, functions):
    """Median seconds of each function; they take turns."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def from_zarr(rows, scratch, repeats, compressors):
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if shutil.disk_usage(folder).free < 60 * rows:
            raise SystemExit(f"{folder} has no room for {rows:,} rows; --scratch names another")
        x, y = make_store(folder, rows, compressors)
        scores, _ = open_store(folder)
        return timed(
            repeats,
            {
                "evaluate": lambda: mml.evaluate(x, y),
                "bare sum": lambda: scores.sum().compute(scheduler="threads"),
            },
        )


def many_classes(repeats, rows=1000, classes=100_000):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((rows, classes), dtype=np.float32)
    target = rng.integers(0, classes, rows)

    def accumulate():
        sums = mml.LossAccumulator()
        sums.update(scores, target)
        return sums.compute()

    return timed(
        repeats, {"evaluate": lambda: mml.evaluate(scores, target), "LossAccumulator": accumulate}
    )


def to_markdown(results):
    about = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# Evaluation",
        "",
        f"{about['cpu']}, {about['cores']} cores, {versions}; {about['date']}. Made by "
        "`python benchmarks/evaluate.py`.",
        "",
        "| what | evaluate | beside it | times |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours, (name, other) = row["seconds"]["evaluate"], list(row["seconds"].items())[1]
        lines.append(
            f"| {row['what']} | {ours:.3f} s | {name} {other:.3f} s | {ours / other:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = []
    for name, compressors in (("compressed", "auto"), ("not compressed", None)):
        what = f"{given.rows:,} x 10 from Zarr, {name}"
        seconds = from_zarr(given.rows, given.scratch, given.repeats, compressors)
        found.append({"what": what, "seconds": seconds})
        print(found[-1], flush=True)
    seconds = many_classes(given.repeats)
    found.append({"what": "1,000 x 100,000 in memory", "seconds": seconds})
    print(found[-1], flush=True)
    results = {"machine": machine(), "rows": found}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "evaluate.json").write_text(json.dumps(results, indent=1) + "\n")
    (given.out / "evaluate.md").write_text(to_markdown(results))


if __name__ == "__main__":
    main()
