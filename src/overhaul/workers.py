"""One piece of work for each of many jobs, on several processes: of this machine (joblib), or of a Ray cluster.

1. Results come as they are finished, in no order. A job is a function of what it is given alone, so neither the engine nor
   the number of workers changes a result on machines of one kind.
2. A worker that dies (out of memory, killed, its machine gone) takes no more with it than what it had in hand: new ones get
   that, at most `TRIES` times. What a job itself raises ends the work, in its own words.
3. Workers run with one thread each, as each is one of several. With one worker, joblib's work is done here.
4. Ray is the extra `overhaul[scale]`. A Ray that runs in this process already is used and left running; else one is started
   here, or joined at `address`, and left at the end. Machines of a cluster need Overhaul and its libraries installed.
5. Work and results are pickled between processes of one owner: whoever can reach a Ray cluster's ports can run code there.
"""

from __future__ import annotations

import importlib
import importlib.util
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

from overhaul.errors import RequestError, RunError

Job = TypeVar("Job")
Result = TypeVar("Result")
Engine = Literal["joblib", "ray"]

TRIES = 3
"""How often workers that died are replaced."""


def check(who: str, engine: Engine, address: str | None, device: torch.device) -> None:
    """What must be there, before work begins.

    Args:
        who: the method's name, for errors.
        engine: what spreads the work.
        address: of a Ray cluster.
        device: where the model lies that workers get.

    Raises:
        RequestError: Ray is not installed or cannot be imported, an address without Ray, or a model on a GPU for workers
            that see none.
    """
    if engine == "joblib" and address is not None:
        raise RequestError(
            f"{who}: `address` is that of a Ray cluster; write `engine: ray` beside it, or leave it out."
        )
    if engine == "joblib":
        return
    if not has_ray():
        raise RequestError(
            f"{who}: `engine: ray` needs `pip install overhaul[scale]`; `engine: joblib` spreads the work over processes of "
            "this machine without it."
        )
    _imported(who)
    if device.type != "cpu":
        raise RequestError(f"{who}: workers on Ray see no GPU, and the model lies on {device}. Write `device: cpu`.")


def has_ray() -> bool:
    """Whether the extra is installed, without importing it."""
    return importlib.util.find_spec("ray") is not None


def _imported(who: str) -> Any:
    """Ray.

    Raises:
        RequestError: it is there in part, and cannot be imported.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        lacking = f"the module {error.name!r} is missing" if error.name else str(error)
        raise RequestError(
            f"{who}: `engine: ray` finds Ray, but cannot import it: {lacking}. Write `pip install --force-reinstall "
            "overhaul[scale]`, or `engine: joblib`."
        ) from None


def spread(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    engine: Engine = "joblib",
    address: str | None = None,
) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, as soon as that is there.

    Args:
        work: can be pickled by cloudpickle, with what it holds.
        jobs: all different.
        workers: at most so many jobs are under way at once.
        engine: "joblib" or "ray".
        address: where a Ray cluster runs ("auto", "10.0.0.1:6379"); None for one of this process.

    Raises:
        RequestError: there are no workers, or no Ray cluster is at `address`.
        RunError: workers died again and again.
    """
    if workers < 1:
        raise RequestError(f"`workers` is {workers}, and somebody has to do the work: write 1 or more.")
    if engine == "ray":
        yield from _on_ray(work, jobs, workers, address)
    elif workers == 1:
        yield from ((job, work(job)) for job in jobs)
    else:
        yield from _on_joblib(work, jobs, workers)


def _alone(work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[tuple[Job, Result]]:
    """In a worker: as many threads as one of several has."""
    torch.set_num_threads(1)
    return [(job, work(job)) for job in jobs]


def _died(left: int, jobs: int, reason: object) -> RunError:
    return RunError(
        f"Workers died {TRIES} times, at last with {left} of {jobs} jobs left: {reason} What is finished is kept; write "
        "fewer `workers` if memory runs out, and run it again."
    )


def _on_joblib(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    from joblib import Parallel, delayed

    left, lost = list(jobs), 0
    while left:
        size = max(1, min(8, len(left) // (4 * workers)))
        runs: Any = Parallel(n_jobs=workers, return_as="generator_unordered")(
            delayed(_alone)(work, left[n : n + size]) for n in range(0, len(left), size)
        )
        try:
            for several in runs:
                for job, result in several:
                    left.remove(job)
                    yield job, result
        except BrokenProcessPool as error:
            lost += 1
            if lost == TRIES:
                raise _died(len(left), len(jobs), error) from None


def _on_ray(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, address: str | None
) -> Iterator[tuple[Job, Result]]:
    """As many tasks as there are workers, each with one job; Ray itself gives what a dead worker had to another."""
    with _ray(workers, address) as ray:
        shared = ray.put(work)
        task = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_alone)
        waiting, under_way, done = iter(jobs), set[Any](), 0
        try:
            while True:
                for job in waiting:
                    under_way.add(task.remote(shared, [job]))
                    if len(under_way) == workers:
                        break
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), num_returns=1)
                under_way.difference_update(ready)
                for found in ready:
                    yield from _got(ray, found, len(jobs) - done, len(jobs))
                    done += 1
        finally:
            for other in under_way:
                ray.cancel(other, force=True)


def _got(ray: Any, found: Any, left: int, jobs: int) -> list[tuple[Any, Any]]:
    """What a task found."""
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    try:
        return ray.get(found)
    except lost as error:
        raise _died(left, jobs, str(error).strip().split("\n")[0]) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _reach(address: str | None) -> None:
    """Whether anybody listens at an address with a port; Ray itself would try for minutes.

    Raises:
        RequestError: nobody does.
    """
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RequestError(f"No Ray cluster answers at `address: {address}` ({error}).") from None


@contextmanager
def _ray(workers: int, address: str | None) -> Iterator[Any]:
    """Ray, running; where this started it, it is left again.

    Raises:
        RequestError: there is no cluster at `address`, or this process is at work on another one.
    """
    ray = _imported("workers")
    if ray.is_initialized():
        if address is not None:
            raise RequestError(
                f"Ray runs in this process already; leave `address: {address}` out to use it, or call ray.shutdown()."
            )
        yield ray
        return
    _reach(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    local: dict[str, Any] = (
        {"num_cpus": workers, "include_dashboard": False} if address is None else {"address": address}
    )
    try:
        ray.init(**quiet, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "here" if address is None else f"at `address: {address}`"
        raise RequestError(f"Ray does not run {where}: {' '.join(str(error).split())[:300]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
