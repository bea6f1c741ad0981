"""Runs the tasks of a stage: in processes here, on a Ray cluster, or as Slurm jobs.

All three do the same with a task (`pipeline.run_rank`) and count on its receipt alone. The local pool is
concurrent.futures': datatrove's own waits for ever for a worker that the kernel has killed. Ray is used directly:
datatrove's executor forks a pool in each Ray worker, which at times waits for ever when it should end.
"""

import logging
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.hardware import available_cpu_count
from tinyllama.prepare.tasks import Job
from tinyllama.prepare.worker import run_task
from tinyllama.processes import set_parent_death_signal

_RETRIES = 3
"""Times that Ray does a task again whose worker was lost."""


def run_local(job: Job, stage: str, ranks: list[int], started: Callable[[], None]) -> None:
    """Run tasks of a stage in processes of this machine; `started` is called once they are there.

    Raises InputError with the first task's problem; those under way are finished, the others are not begun.
    """
    workers = min(len(ranks), available_cpu_count() if job.recipe.data.workers == "auto" else job.recipe.data.workers)
    if workers <= 1:
        started()
        for rank in ranks:
            run_task(job, stage, rank)
        return
    # A forked worker has the modules and the tokenizer from the start, which saves a second.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _init_worker, (job,)) as pool:
        futures = [pool.submit(_run_task_in_worker, stage, rank) for rank in ranks]
        started()
        try:
            _wait(job, futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _wait(job: Job, futures: list[Future[None]]) -> None:
    try:
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool:
        raise _worker_killed_error(job) from None


def _worker_killed_error(job: Job) -> InputError:
    return InputError(
        f"{job.store}: a worker was killed, perhaps for want of memory; run prepare again with fewer data.workers: "
        "it goes on from here"
    )


_own_job: Job


def _init_worker(job: Job) -> None:
    global _own_job  # noqa: PLW0603 - a pool's worker has no other place for what all its tasks share
    _own_job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback of its own
    set_parent_death_signal()


def _run_task_in_worker(stage: str, rank: int) -> None:
    run_task(_own_job, stage, rank)


def run_ray(job: Job, stage: str, ranks: list[int], started: Callable[[], None]) -> None:
    """Run tasks of a stage on the Ray cluster that RAY_ADDRESS names, or on a Ray started here.

    Its machines need this package, and the recipe's paths. Raises InputError with the first task's problem; those that
    Ray has are finished, the others are not begun.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError:
        raise InputError("data.executor: ray is not installed; pip install 'tinyllama[ray]', or say local") from None
    with _ray_session(ray):
        started()
        _run_on(ray, job, stage, ranks)
    if lost := job.unfinished(stage, ranks):
        raise InputError(
            f"{job.work}: task {lost[0]} of {stage} ended and left no receipt here; give every machine of the Ray "
            "cluster this folder, under an absolute path that is the same on all"
        )


@contextmanager
def _ray_session(ray: Any) -> Iterator[None]:
    """A cluster that this process has already, or one until the block ends, and Ray's way with SIGTERM no longer."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))  # its own default is for ever
    before = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _run_on(ray: Any, job: Job, stage: str, ranks: list[int]) -> None:
    """A core and a gibibyte for each task; one whose worker is lost is done again by Ray, up to `_RETRIES` times."""
    begin, shared = ray.remote(num_cpus=1, memory=1 << 30, max_retries=_RETRIES)(run_task).remote, ray.put(job)
    waiting, under_way, problems = ranks[::-1], list[Any](), list[InputError]()
    try:
        while under_way or (waiting and not problems):
            while waiting and not problems and len(under_way) < _max_in_flight(ray, job):
                under_way.append(begin(shared, stage, waiting.pop()))
            (ended,), under_way = ray.wait(under_way)
            problems += _task_error(ray, job, ended)
    finally:
        for task in under_way:
            ray.cancel(task, force=True)
    if problems:
        raise problems[0]


def _max_in_flight(ray: Any, job: Job) -> int:
    """Tasks that Ray may have: with `auto` twice its cores of this moment, so that it can see that it needs more."""
    workers = job.recipe.data.workers
    return max(1, 2 * int(ray.cluster_resources().get("CPU", 0))) if workers == "auto" else workers


def _task_error(ray: Any, job: Job, task: Any) -> list[InputError]:
    """What a task that has ended says of the input, or that its worker was lost; what else went wrong is raised."""
    errors = ray.exceptions
    try:
        ray.get(task)
    except errors.RayTaskError as error:
        if not isinstance(error.cause, InputError):
            raise
        return [error.cause]
    except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError):
        return [_worker_killed_error(job)]
    return []


def _run_slurm_rank(job: Job, stage: str, ranks: list[int], data: Any, rank: int, world: int) -> None:
    """A datatrove step that does one of the tasks that are left."""
    run_task(job, stage, ranks[rank])


def submit_slurm(job: Job, pending: dict[str, list[int]], finish: Callable[..., None]) -> list[str]:
    """Submit the stages that have tasks left as job arrays, each after the one before, and `finish` after all.

    Returns the jobs' numbers. Raises InputError where there is no sbatch, or where it refuses.
    """
    steps = {
        stage: (partial(_run_slurm_rank, job, stage, ranks), len(ranks)) for stage, ranks in pending.items() if ranks
    }
    before: str | None = None
    numbers = []
    for name, (step, tasks) in (steps | {"finish": (finish, 1)}).items():
        executor = _slurm_executor(job, name, step, tasks, before)
        try:
            executor.launch_job()
        except FileNotFoundError:
            raise InputError("data.executor: no sbatch here; run this on a login node of the Slurm cluster") from None
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"data.slurm: sbatch refused {name} (status {error.returncode}); correct data.slurm"
            ) from None
        before = str(executor.job_id)
        numbers.append(before)
    return numbers


def _slurm_executor(job: Job, name: str, step: Callable[..., None], tasks: int, before: str | None) -> Any:
    from datatrove.executor.slurm import SlurmPipelineExecutor  # noqa: PLC0415 - half a second that only Slurm is worth

    slurm, workers = job.recipe.data.slurm, job.recipe.data.workers
    assert slurm is not None  # the recipe's validation
    programs = shlex.quote(str(Path(sys.executable).parent))
    most_jobs = 1000  # Slurm's MaxArraySize is 1001 unless a cluster says otherwise
    return SlurmPipelineExecutor(
        pipeline=[step],
        tasks=tasks,
        tasks_per_job=-(-tasks // most_jobs),
        time=slurm.time,
        partition=slurm.partition,
        workers=-1 if workers == "auto" else workers,
        mem_per_cpu_gb=slurm.memory_gigabytes,
        job_name=f"tinyllama-{job.recipe.name}-{name}",
        qos="",
        env_command=f"cd {shlex.quote(str(Path.cwd()))}; export PATH={programs}:$PATH",
        depends_job_id=before,
        logging_dir=str((job.slurm / name).absolute()),
        skip_completed=False,
        sbatch_args=dict(slurm.arguments),
    )
