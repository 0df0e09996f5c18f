"""Who does the work: threads, processes, or the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from queue import Empty, SimpleQueue
from typing import Any

from mml_arrayapi.evaluation.inputs import InputError, WorkerError

Task = Callable[..., Any]
Jobs = Sequence[tuple[int, tuple[Any, ...]]]  # a number, and the task's arguments

CONNECT = 10  # seconds to wait for a scheduler's answer


def run(
    task: Task, jobs: Jobs, scheduler: str, workers: int | None, timeout: float
) -> Iterator[tuple[int, Any]]:
    """Run a task for every job, and yield each job's number and result as they come.

    Parameters
    ----------
    task : callable
        A function of an importable module.
    jobs : sequence of (int, tuple)
        A number, and the task's arguments.
    scheduler : str
        ``"threads"``, ``"processes"``, or the address of a Dask scheduler.
    workers : int or None
        How many threads or processes; of a cluster, how many workers to wait for.
    timeout : float
        Seconds without any result after which a cluster's unfinished jobs go to other workers.

    Yields
    ------
    (int, result)

    Raises
    ------
    InputError
        No scheduler answers at that address.
    WorkerError
        Workers died again and again, or hang.
    """
    if scheduler == "threads":
        return _in_pool(ThreadPoolExecutor(workers), task, jobs)
    if scheduler == "processes":
        from multiprocessing import get_context

        # Forked children of a process with threads may hang.
        return _in_pool(ProcessPoolExecutor(workers, get_context("spawn")), task, jobs)
    return _on_cluster(scheduler, workers or 1, timeout, task, jobs)


def _in_pool(pool: Executor, task: Task, jobs: Jobs) -> Iterator[tuple[int, Any]]:
    try:
        numbers = {pool.submit(task, *arguments): number for number, arguments in jobs}
        for future in as_completed(numbers):
            yield numbers.pop(future), future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process died (killed, or out of memory); run again, with fewer workers or a "
            "smaller chunk size"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_cluster(
    address: str, workers: int, timeout: float, task: Task, jobs: Jobs
) -> Iterator[tuple[int, Any]]:
    client = _connect(address, workers, timeout)
    finished: SimpleQueue[Any] = SimpleQueue()
    left = dict(jobs)
    running: dict[int, Any] = {}

    def submit(numbers: Sequence[int], **where: Any) -> None:
        for number in numbers:
            future = running[number] = client.submit(task, *left[number], pure=False, **where)
            future.add_done_callback(lambda done, number=number: finished.put((number, done)))

    with client:
        submit(list(left))
        while left:
            try:
                number, future = finished.get(timeout=timeout)
            except Empty:
                submit(list(left), workers=_idle_workers(client, timeout, set()))
                continue
            if number not in left or running[number] is not future:
                continue  # it was given to another worker as well
            try:
                result = _result(future, timeout)
            except TimeoutError:  # the worker that holds the result hangs
                holders = {worker for held in client.who_has([future]).values() for worker in held}
                submit([number], workers=_idle_workers(client, timeout, holders))
                continue
            del left[number], running[number]
            yield number, result


def _connect(address: str, workers: int, timeout: float) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(
            f"scheduler {address}: needs {error.name}; pip install 'mml_arrayapi[dask]'"
        ) from error
    try:
        client = Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"scheduler {address}: no Dask scheduler answers there; accepted are 'threads', "
            "'processes', or an address such as tcp://127.0.0.1:8786, which `dask scheduler` prints"
        ) from error
    try:
        client.wait_for_workers(workers, timeout=timeout)
    except OSError as error:  # TimeoutError is one
        have = len(client.scheduler_info()["workers"])
        client.close()
        raise WorkerError(
            f"scheduler {address}: has {have} workers, but {workers} are waited for; start "
            f"some with `dask worker {address}`"
        ) from error
    return client


def _idle_workers(client: Any, timeout: float, hanging: set[str]) -> list[str]:
    """Return the workers that have nothing to do; the others hang."""
    busy = {worker for worker, tasks in client.processing().items() if tasks} | hanging
    there = client.scheduler_info(n_workers=-1)["workers"]
    idle = [worker for worker in there if worker not in busy]
    if not idle:
        raise WorkerError(
            f"no piece has been finished for {timeout:g} s, and no worker is idle; hanging, or too "
            f"slow for the timeout: {', '.join(sorted(busy)) or 'none is left'}; restart them, and "
            "run again (a checkpoint keeps what is finished)"
        )
    return idle


def _result(future: Any, timeout: float) -> Any:
    from distributed import KilledWorker

    try:
        return future.result(timeout=timeout)
    except TimeoutError:
        raise
    except KilledWorker as error:
        raise WorkerError(
            f"workers died again and again while they worked on one piece ({error.last_worker}); "
            "give them more memory, or use a smaller chunk size"
        ) from error
    except Exception as error:
        if future.cancelled():
            raise WorkerError(
                "the connection to the scheduler is lost; run again (a checkpoint keeps what is "
                "finished)"
            ) from error
        raise
