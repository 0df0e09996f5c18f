"""Dask: this library's kernel against the generic graph, map_blocks with PyTorch, and a bare sum.

Run ``python benchmarks/dask_growth.py --part PART`` for each of the parts, which take at most four
minutes each on two cores, or without ``--part`` for all of them (3 GB of disk under ``--scratch``).
Each figure is the median of the repetitions, which go round the methods, so that all of them see
the same machine. Results, with the machine, go to ``benchmarks/results``: ``dask_growth.json``,
``.md`` and ``.png``.

- ``graph`` and ``large graph``: tasks after ``dask.optimize``, and the time to build and to
  optimise, at 10,000 and at 100,000 chunks.
- ``memory``: 2e6 x 100 float32 in chunks of 1e5 rows, on threads; also in chunks on both axes. Each
  chunk is an array of its own, as one that was read or computed is.
- ``scattered``: the same data on a cluster of two processes that talk over TCP. The client sends
  every chunk from its memory, so that chunks lie at any address.
- ``growth`` and ``cluster``: rows x 10 float32 in a Zarr store (chunks of 1e6 rows, or the whole if
  it has fewer), on threads and on a cluster of one process per core: time, tasks, and the peak of
  this process's memory beyond what it was before (on threads). The store is not compressed (random
  floats don't shrink; a compressed chunk would lie beside the decoded one), and the C library is
  told to give freed memory back, by the variable that Dask sets for its workers.
"""

from __future__ import annotations

import argparse
import contextlib
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


def seconds(repeats, **functions):
    """Return each function's median, measured in turns."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def graphs(kinds):
    """Count tasks, and time their making, on chunks that are made and on chunks in memory."""
    found = []
    for name, n in kinds:
        shape = (4 * n, 8)
        if name == "made":
            x, y = da.zeros(shape, dtype="f4", chunks=(4, 8)), da.zeros(4 * n, dtype=int, chunks=4)
        else:
            x = da.from_array(np.zeros(shape, np.float32), chunks=(4, 8))
            y = da.from_array(np.zeros(4 * n, np.int64), chunks=4)
        for method, build in {
            "bare sum": x.sum,
            "loss": lambda x=x, y=y: mml.multi_margin_loss(x, y),
            "gradient": lambda x=x, y=y: mml.multi_margin_loss_and_grad(x, y)[1],
        }.items():
            if n > 10_000 and method == "gradient":
                continue
            times = []
            for _ in range(3 if n == 10_000 else 1):
                start = time.perf_counter()
                tasks = n_tasks(build())
                times.append(time.perf_counter() - start)
            row = {"chunks": n, "which": name, "method": method, "tasks": tasks}
            found.append({**row, "seconds": statistics.median(times)})
            print(found[-1], flush=True)
    return found


def big(rows=2_000_000, classes=100):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((rows, classes), dtype=np.float32)
    return scores, rng.integers(0, classes, rows)


def in_memory(repeats):
    scores, target = big()
    y = da.from_array(target, chunks=100_000, name="y")
    arrays = {}
    for chunks in ((100_000, 100), (100_000, 25)):
        x = da.from_array(scores, chunks=chunks).map_blocks(np.array).persist(scheduler="threads")
        for name, method in METHODS.items():
            if name != "map_blocks, PyTorch" or chunks[1] == 100:
                arrays[chunks, name] = method(x, y)
        pair = mml.multi_margin_loss_and_grad(x, y)
        arrays[chunks, "gradient"] = pair[1]
    return times_of(arrays, repeats, lambda a: a.compute(scheduler="threads"))


def times_of(arrays, repeats, compute):
    """Measure arrays: {(chunks, method): array}.

    The kernel and the bare sum are measured by themselves: what the others allocate and free (a
    gradient is 800 MB) makes whatever runs next slower.
    """
    fast = [key for key in arrays if key[1] in ("kernel", "bare sum")]
    slow = [key for key in arrays if key not in fast]
    times = {}
    for keys, turns in ((fast, repeats), (slow, 3)):
        functions = {str(i): lambda key=key: compute(arrays[key]) for i, key in enumerate(keys)}
        times |= dict(zip(keys, seconds(turns, **functions).values(), strict=True))
    found = []
    for (chunks, name), array in arrays.items():
        row = {"chunks": list(chunks), "method": name, "tasks": n_tasks(array)}
        row["tasks per chunk"] = row["tasks"] / (2_000_000 // chunks[0] * (100 // chunks[1]))
        found.append({**row, "seconds": times[chunks, name]})
        print(found[-1], flush=True)
    return found


def scattered(repeats):
    """Send every chunk from this process to a worker, and compute on the cluster."""
    scores, target = big()
    arrays = {}
    with a_cluster(2) as client:
        for chunks in ((100_000, 100), (100_000, 25)):
            x = sent(client, scores, chunks)
            y = sent(client, target, chunks[:1])
            for name in ("kernel", "bare sum"):
                arrays[chunks, name] = METHODS[name](x, y)
        unaligned = sum(not flag for flag in client.gather(client.map(is_aligned, client.sent)))
        print(f"{unaligned} of {len(client.sent)} blocks are not aligned", flush=True)
        return times_of(arrays, repeats, lambda a: client.compute(a).result())


def is_aligned(block):
    return bool(block.flags.aligned)


def sent(client, array, chunks):
    cut = da.core.normalize_chunks(chunks, array.shape)
    blocks = [np.ascontiguousarray(array[place]) for place in da.core.slices_from_chunks(cut)]
    futures = client.scatter(blocks, hash=False)
    client.sent = [*getattr(client, "sent", []), *futures]
    made = [da.from_delayed(f, b.shape, b.dtype) for f, b in zip(futures, blocks, strict=True)]
    columns = len(cut[-1]) if array.ndim > 1 else 1
    rows = [made[at : at + columns] for at in range(0, len(made), columns)]
    x = da.concatenate(made) if array.ndim == 1 else da.block(rows)
    return client.persist(x)


@contextlib.contextmanager
def a_cluster(n):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=n,
            threads_per_worker=1,
            processes=True,
            protocol="tcp://",
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(n)
        yield client


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
import json, sys, threading, time
sys.path.insert(0, {here!r})
import dask.array as da
import psutil
from dask_growth import METHODS, n_tasks, open_store
x, y = open_store({folder!r})
array = METHODS[{method!r}](x, y)
# Imports are done, and threads started, before.
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
GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "65536"}


def growth(scratch, sizes, repeats):
    found = []
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            make_store(folder, rows)
            names = [n for n in METHODS if rows <= 10**7 or n in ("kernel", "bare sum")]
            turns = [[alone(folder, name) for name in names] for _ in range(repeats)]
            for name, measured in zip(names, zip(*turns, strict=True), strict=True):
                row = {"rows": rows, "method": name, "where": "threads"}
                for figure in measured[0]:
                    row[figure] = statistics.median(one[figure] for one in measured)
                found.append(row)
                print(row, flush=True)
    return found


def alone(folder, name):
    code = ALONE.format(here=str(Path(__file__).parent), folder=folder, method=name)
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **GIVE_BACK},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout)


def on_cluster(scratch, sizes, repeats):
    found = []
    with a_cluster(os.cpu_count()):
        for rows in sizes:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                make_store(folder, rows)
                arrays = {name: method(*open_store(folder)) for name, method in METHODS.items()}
                times = seconds(repeats, **{n: a.compute for n, a in arrays.items()})
                for name, took in times.items():
                    row = {"rows": rows, "method": name, "where": "cluster", "seconds": took}
                    found.append(row)
                    print(row, flush=True)
    return found


def machine():
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
            model = names[0] if names else model
    names = ("numpy", "dask", "distributed", "zarr", "torch", "mml_arrayapi")
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
    ]
    if "graph" in results:
        lines += [
            "",
            "## Graphs, after `dask.optimize`",
            "",
            "| chunks | method | tasks | times the bare sum's | seconds to build and optimise | "
            "times the bare sum's |",
            "|---|---|---|---|---|---|",
        ]
        for row in [*results["graph"], *results.get("large graph", [])]:
            if row["method"] == "bare sum":
                bare = row
            lines.append(
                f"| {row['chunks']:,} {row['which']} | {row['method']} | {row['tasks']:,} | "
                f"{row['tasks'] / bare['tasks']:.2f} | {row['seconds']:.2f} | "
                f"{row['seconds'] / bare['seconds']:.2f} |"
            )
    for part, title in (
        ("memory", "in memory, on threads"),
        ("scattered", "scattered by the client over two TCP workers"),
    ):
        if part in results:
            lines += ["", f"## 2e6 x 100 float32 {title}", "", *_table(results[part])]
    if "growth" in results:
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


def _table(rows):
    floor = next(r["seconds"] for r in rows if r["method"] == "bare sum")
    return [
        "| chunks | method | seconds | times the bare sum by rows | tasks | tasks per chunk |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['chunks'][0]} x {r['chunks'][1]} | {r['method']} | {r['seconds']:.3f} | "
            f"{r['seconds'] / floor:.2f} | {r['tasks']} | {r['tasks per chunk']:.2f} |"
            for r in rows
        ),
    ]


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


PARTS = ("graph", "large graph", "memory", "scattered", "growth", "cluster")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", default=tempfile.gettempdir())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--part", choices=PARTS, action="append")
    options = parser.parse_args()
    path = RESULTS / "dask_growth.json"
    results = json.loads(path.read_text()) if options.part and path.exists() else {}
    results["machine"] = machine()
    sizes = [int(rows) for rows in options.rows]
    for part in options.part or PARTS:
        if part == "graph":
            results[part] = graphs([("made", 10_000), ("in memory", 10_000)])
        elif part == "large graph":
            results[part] = graphs([("made", 100_000)])
        elif part in ("memory", "scattered"):
            results[part] = {"memory": in_memory, "scattered": scattered}[part](options.repeats)
        else:
            where, run = {"growth": ("threads", growth), "cluster": ("cluster", on_cluster)}[part]
            kept = [r for r in results.get("growth", []) if r["where"] != where]
            made = run(options.scratch, sizes, 3)
            results["growth"] = sorted(kept + made, key=lambda r: (r["where"], r["rows"]))
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "dask_growth.md").write_text(to_markdown(results))
    if "growth" in results:
        plot(results, RESULTS / "dask_growth.png")


if __name__ == "__main__":
    main()
