"""Who does the work: threads, or the workers of a Dask cluster, on this machine or elsewhere."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import islice
from multiprocessing import current_process, get_context, resource_tracker
from operator import attrgetter
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Event, Thread, current_thread, main_thread
from time import monotonic
from typing import Any, NamedTuple
from uuid import uuid4

from mml_arrayapi._version import __version__
from mml_arrayapi.evaluation.errors import InputError, WorkerError, one_line, require
from mml_arrayapi.evaluation.inputs import Batch

CONNECT = 10  # seconds to wait for a scheduler's answer
RETRIES = 2  # of a batch whose reading fails on a cluster
PER_PROCESS = 2**28  # bytes that a worker process takes before it has read anything
COPIES = 5  # of a batch: as read, as decoded from it, and what is derived


class Work(NamedTuple):
    """What is to be done.

    Attributes
    ----------
    count : callable
        A function of an importable module: ``count(batch, *options)``.
    options : tuple
        Its other arguments.
    batches : dict of int to Batch
        What is left, by number.
    lazy : bool
        Whether there are Dask arrays in the batches.
    largest : int
        The bytes of the scores of the largest batch.
    """

    count: Callable[..., Any]
    options: tuple[Any, ...]
    batches: Mapping[int, Batch]
    lazy: bool
    largest: int


def run(
    work: Work, scheduler: Any, workers: int | None, timeout: float
) -> Iterator[tuple[int, Any]]:
    """Count every batch, and yield each one's number and result as they come.

    Parameters
    ----------
    work : Work
        What is to be done.
    scheduler : str, Client or Cluster
        ``"threads"``, ``"processes"``, the address of a Dask scheduler, or one of Dask's clients or
        clusters.
    workers : int or None
        How many threads or processes; of a cluster, how many workers to wait for.
    timeout : float
        Seconds without any result after which a cluster's unfinished batches go to other workers.

    Yields
    ------
    (int, result)

    Raises
    ------
    InputError
        No scheduler answers at that address.
    WorkerError
        Workers have not this version of the package, died again and again, or hang.
    """
    if isinstance(scheduler, str) and scheduler == "threads":
        # One more than there are CPUs: one of them waits for its file most of the time.
        waits = any(p.shard.version for b in work.batches.values() for one in b[2:] for p in one)
        threads = workers or _affordable(_allowed_cpus() + waits, work.largest)
        busy = max(1, min(threads, len(work.batches)))
        work = work._replace(count=partial(_beside, busy, work.count))
        with _threads_start():
            yield from (_on_dask_threads if work.lazy else _on_threads)(work, threads)
        return
    timeout = min(timeout, TIMEOUT_MAX / 2)  # locks take no infinity
    with ExitStack() as stack:
        client = _client(stack, work, scheduler, workers)
        if client.status != "running":
            raise InputError("scheduler: the client or its cluster is closed; give one that is not")
        name = _wait_for(client, scheduler, workers, timeout)
        _check_versions(client, _workers(client), timeout)
        with _interrupts() as finished, stack.pop_all():
            yield from _on_cluster(client, work, timeout, name, finished)


@contextmanager
def _threads_start() -> Iterator[None]:
    """Say what to do where the system allows no more threads."""
    try:
        yield
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise WorkerError(
            f"not as many threads can be started ({one_line(error)}); give fewer --workers, or "
            "allow this process more threads and memory (ulimit -u, ulimit -v)"
        ) from error


def _beside(busy: int, count: Callable[..., Any], *arguments: Any) -> Any:
    """Count a batch on one of several busy threads: it takes a share of the CPUs."""
    from mml_arrayapi.backends.threads import one_of

    with one_of(busy):
        return count(*arguments)


def _affordable(wanted: int, size: int, base: int = 0) -> int:
    """Return how many batches of a size may be worked on at once, by the memory allowed."""
    return max(1, min(wanted, _allowed_memory() // 2 // max(1, COPIES * size + base)))


def _allowed_cpus() -> int:
    try:
        from dask.system import CPU_COUNT  # what control groups allow
    except ImportError:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    return int(CPU_COUNT)


def _allowed_memory() -> int:
    """Return how many bytes this process may take: of the machine or its control group."""
    found = (
        [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    )
    groups = {"/sys/fs/cgroup", "/sys/fs/cgroup/memory"}
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            for line in file:
                _, kinds, path = line.rstrip("\n").split(":", 2)
                if kinds in ("", "memory"):
                    root = f"/sys/fs/cgroup/{kinds}".rstrip("/")
                    parts = path.strip("/").split("/")
                    groups |= {"/".join((root, *parts[:i])) for i in range(len(parts) + 1)}
    except OSError:
        pass
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                with open(f"{group}/{name}", encoding="ascii") as file:
                    found.append(int(file.read()))
            except (OSError, ValueError):  # "max": no limit
                continue
    return min(found, default=2**33)


def _on_threads(work: Work, threads: int) -> Iterator[tuple[int, Any]]:
    left = iter(work.batches.items())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="evaluate")
    running: dict[Any, int] = {}
    try:
        while True:
            # Few are submitted at a time, since finished ones wait here until they are taken.
            for number, batch in islice(left, 2 * threads - len(running)):
                running[pool.submit(work.count, batch, *work.options)] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_dask_threads(work: Work, threads: int) -> Iterator[tuple[int, Any]]:
    """Compute batches of Dask arrays as one graph, so that whatever they share is computed once."""
    import dask

    finished: SimpleQueue[Any] = SimpleQueue()
    stop = Event()

    def deliver(number: int, result: Any) -> None:
        if stop.is_set():
            raise InterruptedError
        finished.put((number, result))

    def compute() -> None:
        try:
            wanted = [dask.delayed(deliver)(n, one) for n, one in _delayed(work).items()]
            dask.compute(wanted, scheduler="threads", num_workers=threads, optimize_graph=False)
        except BaseException as error:  # noqa: BLE001  (raised where it is waited for)
            finished.put((None, error))

    worker = Thread(target=compute, name="evaluate", daemon=True)
    worker.start()
    try:
        for _ in work.batches:
            number, result = finished.get()
            if number is None:
                raise result
            yield number, result
    finally:
        stop.set()
        worker.join()


def _delayed(work: Work) -> dict[int, Any]:
    """Return each batch's count, to be computed together: what their arrays share is one task."""
    import dask

    made = {}
    for number, batch in work.batches.items():
        lazy = [part.shard.source for parts in batch[2:] for part in parts if _is_lazy(part)]
        others = (tuple(None if _is_lazy(p) else p for p in parts) for parts in batch[2:])
        count = partial(_count_blocks, work.count, Batch(*batch[:2], *others), work.options)
        whole = [array.rechunk(-1).to_delayed(optimize_graph=False).item() for array in lazy]
        made[number] = dask.delayed(count, pure=False)(*whole, dask_key_name=_key(batch))
    return made


def _is_lazy(part: Any) -> bool:
    return hasattr(part.shard.source, "dask")


def _count_blocks(count: Callable[..., Any], batch: Batch, options: Any, *arrays: Any) -> Any:
    """Count a batch with arrays in place of those that were lazy."""
    left = iter(arrays)
    parts = (tuple(next(left) if p is None else p for p in one) for one in batch[2:])
    scores, targets, weights = parts
    return count(Batch(*batch[:2], scores, targets, weights), *options)


def _key(batch: Batch) -> str:
    return f"evaluate-rows-{batch.start}-{batch.stop}-{uuid4().hex[:8]}"


def _client(stack: ExitStack, work: Work, scheduler: Any, workers: int | None) -> Any:
    distributed = require("distributed", f"scheduler {scheduler}")
    if getattr(scheduler, "asynchronous", False):
        raise TypeError("scheduler must be a Client or Cluster that is not asynchronous")
    if isinstance(scheduler, distributed.Client):
        return scheduler
    if scheduler == "processes":
        scheduler = _local_cluster(stack, distributed, work, workers)
    elif not isinstance(scheduler, (str, distributed.deploy.Cluster)):
        raise TypeError(
            "scheduler must be 'threads', 'processes', an address, or a Client or Cluster of Dask, "
            f"but is of type {type(scheduler).__name__}"
        )
    try:
        if isinstance(scheduler, str):  # a Client that is given no address stays half-open
            distributed.comm.resolve_address(scheduler)
        client = distributed.Client(scheduler, timeout=CONNECT, set_as_default=False)
    except (OSError, RuntimeError, ValueError) as error:  # in the middle: a cluster that is closed
        raise InputError(
            f"scheduler {scheduler}: no Dask scheduler answers there; accepted are 'threads', "
            "'processes', or an address such as tcp://127.0.0.1:8786, which `dask scheduler` prints"
        ) from error
    return stack.enter_context(client)


def _local_cluster(stack: ExitStack, distributed: Any, work: Work, workers: int | None) -> Any:
    try:
        resource_tracker.ensure_running()  # which unblocks Ctrl-C
        with _interrupts(), _uninterrupted_workers():
            _start_a_process()
            cluster = distributed.LocalCluster(
                n_workers=workers or _affordable(_allowed_cpus(), work.largest, PER_PROCESS),
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # any free port
                silence_logs=logging.CRITICAL + 1,
            )
            return stack.enter_context(cluster)
    except (AssertionError, RuntimeError) as error:  # the former where there may be no children
        raise WorkerError(
            f"the worker processes do not start ({one_line(error)}); {_what_they_need()}"
        ) from error


def _what_they_need() -> str:
    if current_process().daemon:
        return "use threads here, as in the workers of a pool, or the address of a cluster"
    if sys.argv[:1] in (["-"], [""]):  # standard input
        return "each of them imports the program, which must be a file"
    return (
        "there must be memory for them and a program must call evaluate() below `if __name__ == "
        '"__main__":`, since each of them imports it'
    )


def _start_a_process() -> None:
    """Start one as a cluster does. Dask before 2026.8 starts those that end at once for ever."""
    process = get_context("spawn").Process(target=int)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"one ended with exit code {process.exitcode}")


def _wait_for(client: Any, scheduler: Any, workers: int | None, timeout: float) -> str:
    """Wait for the workers; return the scheduler's name for messages."""
    name = scheduler if isinstance(scheduler, str) else client.scheduler.address
    try:
        wanted = client.submit(int, pure=False)  # or an adaptive cluster would start no worker
        client.wait_for_workers(workers or 1, timeout=timeout)
        wanted.release()
    except OSError as error:  # TimeoutError is one
        have, address = len(client.scheduler_info()["workers"]), client.scheduler.address
        todo = f"start some with `dask worker {address}`"
        if not isinstance(scheduler, str) or address.startswith("inproc"):
            todo = f"let its cluster have them, as by scale({workers or 1})"
        raise WorkerError(
            f"scheduler {name}: has {have} workers, but {workers or 1} are waited for; {todo}"
        ) from error
    return name


def _check_versions(client: Any, workers: list[str], timeout: float) -> None:
    """Raise if a worker has not this package, or another version; those that hang are passed over.

    They are asked by functions of Python: without the package, a worker can't even read a batch.
    """
    answers: SimpleQueue[Any] = SimpleQueue()
    versions = {}
    for worker in workers:
        there = {"workers": [worker], "pure": False}
        package = client.submit(import_module, "mml_arrayapi", **there)
        versions[worker] = client.submit(attrgetter("__version__"), package, **there)
        versions[worker].add_done_callback(lambda _, worker=worker: answers.put(worker))
    until = monotonic() + min(timeout, CONNECT)
    with suppress(Empty, TimeoutError):
        for _ in workers:
            worker = answers.get(timeout=max(0, until - monotonic()))
            version = versions[worker]
            if version.status == "error":
                raise WorkerError(
                    f"worker {worker}: mml_arrayapi cannot be imported there "
                    f"({one_line(version.exception())}); install version {__version__} there"
                )
            if version.status != "finished":  # the connection is lost, as the batches will tell
                return
            if (found := version.result(timeout=CONNECT)) != __version__:
                raise WorkerError(
                    f"worker {worker}: has mml_arrayapi {found}, but this is {__version__}; "
                    "install the same on all"
                )


class _Finished(SimpleQueue[Any]):
    """What is finished, by number; and whether Ctrl-C came."""

    interrupted = False


@contextmanager
def _interrupts() -> Iterator[_Finished]:
    """Let Ctrl-C end the queue, and be raised at the end; a second one is raised at once.

    Raised where it comes, it would be lost whenever that is a callback of Dask.
    """
    finished = _Finished()
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        finished.interrupted = True
        finished.put((None, None))

    ours = before is signal.default_int_handler and current_thread() is main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield finished
    except Exception:
        if not finished.interrupted:
            raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
    if finished.interrupted:
        raise KeyboardInterrupt


@contextmanager
def _uninterrupted_workers() -> Iterator[None]:
    """Block Ctrl-C for processes and threads that are started here: the cluster ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_cluster(
    client: Any, work: Work, timeout: float, name: str, finished: _Finished
) -> Iterator[tuple[int, Any]]:
    left = dict(work.batches)
    running: dict[int, Any] = {}

    def watch(number: int, future: Any) -> None:
        running[number] = future
        future.add_done_callback(lambda done: finished.put((number, done)))

    def submit(numbers: Any, **where: Any) -> None:
        for number in numbers:
            if finished.interrupted:
                return
            batch = left[number]
            options = {"key": _key(batch), "pure": False, "retries": RETRIES, **where}
            watch(number, client.submit(work.count, batch, *work.options, **options))

    if work.lazy:
        made = _delayed(work)
        for number, future in zip(
            made, client.compute(list(made.values()), optimize_graph=False), strict=True
        ):
            watch(number, future)
    else:
        submit(left)
    while left and not finished.interrupted:
        try:
            number, future = finished.get(timeout=timeout)
        except Empty:
            submit(list(left), workers=_idle_workers(client, timeout, set()))
            continue
        if number not in left or running[number] is not future:
            continue  # it was given to another worker as well
        try:
            result = _result(future, timeout, name)
        except TimeoutError:  # the worker that holds the result hangs
            holders = {worker for held in client.who_has([future]).values() for worker in held}
            submit([number], workers=_idle_workers(client, timeout, holders))
            continue
        del left[number], running[number]
        yield number, result


def _idle_workers(client: Any, timeout: float, hanging: set[str]) -> list[str]:
    """Return the workers that have nothing to do; the others hang."""
    busy = {worker for worker, tasks in client.processing().items() if tasks} | hanging
    idle = [worker for worker in _workers(client) if worker not in busy]
    if not idle:
        raise WorkerError(
            f"no batch has been finished for {timeout:g} s, and no worker is idle; hanging, or too "
            f"slow for the timeout: {', '.join(sorted(busy)) or 'none is left'}; restart them, and "
            "run again (a checkpoint keeps what is finished)"
        )
    _check_versions(client, idle, timeout)  # some may have come since
    return idle


def _workers(client: Any) -> list[str]:
    return list(client.scheduler_info(n_workers=-1)["workers"])


def _result(future: Any, timeout: float, name: str) -> Any:
    from distributed import KilledWorker

    try:
        return future.result(timeout=timeout)
    except TimeoutError:
        raise
    except KilledWorker as error:
        raise WorkerError(
            f"workers died again and again while they worked on one batch ({error.last_worker}); "
            "give them more memory, or use a smaller chunk size"
        ) from error
    except Exception as error:
        if future.cancelled():
            raise WorkerError(
                f"the connection to the scheduler {name} is lost; run again (a checkpoint keeps "
                "what is finished)"
            ) from error
        raise
