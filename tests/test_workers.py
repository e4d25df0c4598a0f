"""Work on several processes: what a job raises, what a death costs, and what must be there."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import cloudpickle
import pytest
import torch

from overhaul import workers
from overhaul.errors import RequestError, RunError
from overhaul.workers import Engine, spread

ENGINES = [pytest.param("joblib", marks=pytest.mark.smoke), pytest.param("ray", marks=pytest.mark.slow)]


def by_value(engine: Engine) -> None:
    """Functions of this file travel with the work; workers cannot import it."""
    if engine == "ray":
        importlib.import_module("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Work:
    """Squares, by workers that die while less than so many have died before."""

    def __init__(self, folder: Path, deaths: int) -> None:
        self.folder, self.deaths = folder, deaths

    def __call__(self, job: int) -> tuple[int, int, int]:
        dead = len(list(self.folder.glob("died-*")))
        if job == 3 and dead < self.deaths:
            (self.folder / f"died-{dead}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return job**2, torch.get_num_threads(), os.getpid()


def refusing(job: int) -> int:
    """A job that cannot be done."""
    raise RunError(f"job {job} cannot be done")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_that_dies_is_replaced_and_each_has_one_thread(engine: Engine, tmp_path: Path) -> None:
    by_value(engine)
    found = list(spread(Work(tmp_path, 2), range(12), 2, engine))
    assert len(list(tmp_path.iterdir())) == 2
    assert sorted((job, result[0]) for job, result in found) == [(n, n**2) for n in range(12)]
    assert {result[1] for _, result in found} == {1}
    assert os.getpid() not in {result[2] for _, result in found}


@pytest.mark.parametrize("engine", ENGINES)
def test_workers_that_die_again_and_again_end_the_work(engine: Engine, tmp_path: Path) -> None:
    by_value(engine)
    with pytest.raises(RunError, match="Workers died 3 times, at last with .* of 6 jobs left"):
        list(spread(Work(tmp_path, 99), range(6), 2, engine))
    assert len(list(tmp_path.iterdir())) == workers.TRIES


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_job_raises_ends_the_work_in_its_own_words(engine: Engine) -> None:
    by_value(engine)
    with pytest.raises(RunError, match=r"^job \d cannot be done$"):
        list(spread(refusing, range(4), 2, engine))


def test_one_worker_works_here() -> None:
    assert list(spread(lambda job: (job, os.getpid()), [1, 2], 1)) == [(1, (1, os.getpid())), (2, (2, os.getpid()))]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told_and_one_that_runs_here_is_left_running() -> None:
    ray = importlib.import_module("ray")
    by_value("ray")
    with pytest.raises(RequestError, match="No Ray cluster answers at `address: 127.0.0.1:1`"):
        list(spread(abs, [1], 1, "ray", "127.0.0.1:1"))
    assert not ray.is_initialized()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert sorted(spread(abs, [-1, -2, -3], 2, "ray")) == [(-3, 3), (-2, 2), (-1, 1)]
        with pytest.raises(RequestError, match="Ray runs in this process already"):
            list(spread(abs, [1], 1, "ray", "auto"))
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_cluster_of_two_machines_is_joined_at_its_address_and_stays(tmp_path: Path) -> None:
    cluster_utils = importlib.import_module("ray.cluster_utils")
    by_value("ray")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        for _ in range(2):  # what was left can be joined again
            found = list(spread(Work(tmp_path, 1), range(8), 2, "ray", cluster.address))
            assert sorted((job, result[0]) for job, result in found) == [(n, n**2) for n in range(8)]
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        cluster.shutdown()


def test_what_must_be_there_is_told_before_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    workers.check("m", "joblib", None, torch.device("cuda", 0))
    with pytest.raises(RequestError, match="m: `address` is that of a Ray cluster; write `engine: ray`"):
        workers.check("m", "joblib", "auto", cpu)
    monkeypatch.setattr(workers, "has_ray", lambda: True)
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "ray", None)
        with pytest.raises(RequestError, match="m: `engine: ray` finds Ray, but cannot import it: the module 'ray'"):
            workers.check("m", "ray", None, cpu)
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    workers.check("m", "ray", "auto", cpu)
    with pytest.raises(RequestError, match="see no GPU, and the model lies on cuda:0"):
        workers.check("m", "ray", None, torch.device("cuda", 0))
    monkeypatch.setattr(workers, "has_ray", lambda: False)
    with pytest.raises(RequestError, match=r"needs `pip install overhaul\[scale\]`"):
        workers.check("m", "ray", None, cpu)


@pytest.mark.parametrize("engine", ["joblib", "ray"])
def test_no_workers_are_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="`workers` is 0.*write 1 or more"):
        list(spread(abs, [1], 0, engine))
