"""Dask: this library's kernel against the generic graph, map_blocks with PyTorch, and a bare sum.

Run ``python benchmarks/dask_growth.py`` (a few minutes, 5 GB of disk under ``--scratch``). Each
figure is the median of the repetitions; results, with the machine, go to ``benchmarks/results``:
``dask_growth.json``, ``.md`` and ``.png``.

- In memory: 2e6 x 100 float32 in chunks of 1e5 rows, on threads; also chunked on both axes. Each
  chunk is an array of its own, as one that was read or computed is.
- Growth: rows x 10 float32 in a Zarr store (chunks of 1e6 rows, or the whole if it has fewer), rows
  from 1e5 to 1e8, on threads and on a cluster of one process per core; time, tasks, and the peak of
  this process's memory beyond what it was before (on threads). The store is not compressed (random
  floats don't shrink; a compressed chunk would stand beside the decoded one), and the C library is
  told to give freed memory back, by the variable that Dask sets for its workers. One size is also
  measured without either.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import dask
import dask.array as da
import numpy as np

import mml_arrayapi as mml

RESULTS = Path(__file__).parent / "results"
CLASSES, CHUNK = 10, 1_000_000


def torch_block(scores, target):
    """What a user would write: sums of a block's losses with PyTorch, as [[sum, count]]."""
    import torch

    loss = torch.nn.functional.multi_margin_loss(
        torch.from_numpy(scores), torch.from_numpy(target[:, 0]), reduction="sum"
    )
    return np.asarray([[float(loss), len(target)]])


def by_map_blocks(scores, target):
    sums = da.map_blocks(
        torch_block, scores, target[:, None], chunks=((1,) * scores.numblocks[0], (2,)), dtype=float
    )
    total = sums.sum(axis=0)
    return total[0] / total[1]


METHODS = {
    "kernel": mml.multi_margin_loss,
    "generic graph": lambda x, y: mml.multi_margin_loss(x, y, backend="generic"),
    "map_blocks, PyTorch": by_map_blocks,
    "bare sum": lambda x, y: x.sum(),
}


def n_tasks(array):
    return len(dict(dask.optimize(array)[0].__dask_graph__()))


def seconds(array, repeats, compute):
    compute(array)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        compute(array)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_memory(repeats):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2_000_000, 100), dtype=np.float32)
    target = rng.integers(0, 100, len(scores))
    y = da.from_array(target, chunks=100_000, name="y")
    found = []
    for chunks in ((100_000, 100), (100_000, 50), (100_000, 25)):
        x = da.from_array(scores, chunks=chunks).map_blocks(np.array).persist(scheduler="threads")
        for name, method in METHODS.items():
            if "map_blocks" in name and chunks[1] != 100:
                continue
            array = method(x, y)
            row = {"chunks": list(chunks), "method": name, "tasks": n_tasks(array)}
            row["tasks per chunk"] = row["tasks"] / x.npartitions
            row["seconds"] = seconds(array, repeats, lambda a: a.compute(scheduler="threads"))
            found.append(row)
            print(row, flush=True)
    return found


def make_store(folder, rows, compressors=None):
    """Write a data set."""
    import zarr

    rng = np.random.default_rng(0)
    made = []
    for name, shape, dtype in (("x", (rows, CLASSES), "float32"), ("y", (rows,), "int64")):
        path = os.path.join(folder, f"{name}.zarr")
        chunks = (min(CHUNK, rows), *shape[1:])
        store = zarr.create_array(
            store=path, shape=shape, chunks=chunks, dtype=dtype, compressors=compressors
        )
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            part = rng.standard_normal((n, CLASSES), dtype=np.float32)
            store[start : start + n] = part if name == "x" else rng.integers(0, CLASSES, n)
        made.append(path)
    return made


def open_store(folder):
    x, y = (da.from_zarr(os.path.join(folder, f"{name}.zarr")) for name in "xy")
    return x, y


# In a process of its own: the peak of memory cannot be reset.
ALONE = """
import json, resource, sys, threading, time
sys.path.insert(0, {here!r})
import dask.array as da
import psutil
from dask_growth import METHODS, n_tasks, open_store
x, y = open_store({folder!r})
array = METHODS[{method!r}](x, y)
# Imports and compiled code are loaded before; 5e6 scores are enough for the Numba kernel to be.
zeros = [da.zeros(shape, dtype=kind, chunks=100_000) for shape, kind in
         (((500_000, 10), "float32"), ((500_000,), "int64"))]
METHODS[{method!r}](*zeros).compute(scheduler="threads")
before, peak, done = psutil.Process().memory_info().rss, 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, psutil.Process().memory_info().rss)
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
array.compute(scheduler="threads")
took = time.perf_counter() - start
done = True
watcher.join()
print(json.dumps({{"seconds": took, "tasks": n_tasks(array), "peak MB": (peak - before) / 1e6}}))
"""


def growth(scratch, sizes, slow_rows):
    found = []
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            make_store(folder, rows)
            for name in METHODS:
                if rows > slow_rows and name in ("generic graph", "map_blocks, PyTorch"):
                    continue
                found.append(one_size(folder, rows, name, "threads", GIVE_BACK))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        make_store(folder, slow_rows, "auto")
        where = "threads, compressed, as is"
        found += [one_size(folder, slow_rows, name, where, {}) for name in ("kernel", "bare sum")]
    return found


GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "65536"}


def one_size(folder, rows, name, where, variables):
    code = ALONE.format(here=str(Path(__file__).parent), folder=folder, method=name)
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    local = {"rows": rows, "method": name, "where": where, **json.loads(out.stdout)}
    print(local, flush=True)
    return local


def on_cluster(scratch, sizes):
    from distributed import Client, LocalCluster

    found = []
    with (
        LocalCluster(
            n_workers=os.cpu_count(), threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster),
    ):
        for rows in sizes:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                make_store(folder, rows)
                x, y = open_store(folder)
                for name, method in METHODS.items():
                    took = seconds(method(x, y), 1, lambda a: a.compute())
                    row = {"rows": rows, "method": name, "where": "cluster"}
                    found.append({**row, "seconds": took})
                    print(found[-1], flush=True)
    return found


def machine():
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
            model = names[0] if names else model
    names = ("numpy", "numba", "dask", "distributed", "zarr", "torch", "mml_arrayapi")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": date.today().isoformat(),
        "load before": os.getloadavg()[0],
    }


def to_markdown(results):
    about = results["machine"]
    lines = [
        "# Dask: time, tasks and memory",
        "",
        f"{about['cpu']}, {about['cores']} cores, Python {about['python']}, "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + f"; {about['date']}. Made by `python benchmarks/dask_growth.py`; load average before the "
        + f"last part: {about['load before']:.1f} (other jobs on the machine, if above 0).",
        "",
        "## 2e6 x 100 float32 in memory, on threads",
        "",
        "| chunks | method | seconds | times the bare sum by rows | tasks | tasks per chunk |",
        "|---|---|---|---|---|---|",
    ]
    floor = next(r["seconds"] for r in results["in memory"] if r["method"] == "bare sum")
    lines += [
        f"| {r['chunks'][0]} x {r['chunks'][1]} | {r['method']} | {r['seconds']:.3f} | "
        f"{r['seconds'] / floor:.2f} | {r['tasks']} | {r['tasks per chunk']:.2f} |"
        for r in results["in memory"]
    ]
    lines += [
        "",
        "## Rows x 10 float32 from Zarr (chunks of 1e6 rows, 40 MB)",
        "",
        "| rows | where | method | seconds | ns per row | tasks | peak MB beyond the start |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['rows']:.0e} | {r['where']} | {r['method']} | {r['seconds']:.3f} | "
        f"{1e9 * r['seconds'] / r['rows']:.0f} | {r.get('tasks', '')} | "
        f"{round(r['peak MB']) if 'peak MB' in r else ''} |"
        for r in results["growth"]
    ]
    return "\n".join(lines) + "\n"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for where, style in (("threads", "-o"), ("cluster", "--s")):
        for i, name in enumerate(METHODS):
            rows = [r for r in results["growth"] if (r["method"], r["where"]) == (name, where)]
            x = [r["rows"] for r in rows]
            label, colour = f"{name}, {where}", f"C{i}"
            left.loglog(x, [r["seconds"] for r in rows], style, color=colour, label=label)
            if where == "threads":
                right.semilogx(x, [r["peak MB"] for r in rows], style, color=f"C{i}", label=name)
    left.set(xlabel="rows", ylabel="seconds", title="time from Zarr, rows x 10 float32")
    right.set(xlabel="rows", ylabel="MB beyond the start", title="peak memory, threads")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", default=tempfile.gettempdir())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--part", choices=("memory", "growth", "cluster"), action="append")
    options = parser.parse_args()
    parts = options.part or ["memory", "growth", "cluster"]
    path = RESULTS / "dask_growth.json"
    results = json.loads(path.read_text()) if options.part and path.exists() else {"growth": []}
    results["machine"] = machine()
    sizes = [int(rows) for rows in options.rows]
    if "memory" in parts:
        results["in memory"] = in_memory(options.repeats)
    for part, function in (
        ("growth", lambda: growth(options.scratch, sizes, 10**7)),
        ("cluster", lambda: on_cluster(options.scratch, [n for n in sizes if n <= 10**7])),
    ):
        if part in parts:
            where = "threads" if part == "growth" else "cluster"
            kept = [r for r in results["growth"] if not r["where"].startswith(where)]
            results["growth"] = sorted(kept + function(), key=lambda r: (r["where"], r["rows"]))
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if "in memory" in results:
        (RESULTS / "dask_growth.md").write_text(to_markdown(results))
    plot(results, RESULTS / "dask_growth.png")


if __name__ == "__main__":
    main()
