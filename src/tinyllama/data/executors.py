"""Runs the tasks of a stage: in processes here, on a Ray cluster, or as Slurm jobs.

All three do the same with a task (`pipeline.run_rank`) and count on its receipt alone. The local pool is
concurrent.futures': datatrove's own waits for ever for a worker that the kernel has killed. Ray is asked itself:
datatrove's executor forks a pool in each of Ray's workers, which at times waits for ever when it should end.
"""

import logging
import multiprocessing
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from tinyllama.data.pipeline import run_rank
from tinyllama.data.tasks import Job
from tinyllama.errors import InputError
from tinyllama.processes import end_with_parent, usable_cores

# datatrove announces every task on standard error, in every worker; here the progress bar does.
logger.disable("datatrove")


def run_local(job: Job, stage: str, ranks: list[int], started: Callable[[], None]) -> None:
    """Run tasks of a stage in processes of this machine; `started` is called once they are there.

    Raises InputError with the first task's problem; those under way are finished, the others are not begun.
    """
    workers = min(len(ranks), usable_cores() if job.recipe.data.workers == "auto" else job.recipe.data.workers)
    if workers <= 1:
        started()
        for rank in ranks:
            run_rank(job, stage, rank)
        return
    # A forked worker has the modules and the tokenizer from the start, which is worth a second; elsewhere than on
    # Linux forking is not safe.
    context = multiprocessing.get_context("fork" if platform.system() == "Linux" else "spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker, (job,)) as pool:
        futures = [pool.submit(_run_own, stage, rank) for rank in ranks]
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
        raise _killed(job) from None


def _killed(job: Job) -> InputError:
    return InputError(
        f"{job.store}: a worker was killed, perhaps for want of memory; run prepare again with fewer data.workers: "
        "it goes on from here"
    )


_own_job: Job


def _begin_worker(job: Job) -> None:
    global _own_job  # noqa: PLW0603 - a pool's worker has no other place for what all its tasks share
    _own_job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback of its own
    end_with_parent()


def _run_own(stage: str, rank: int) -> None:
    run_rank(_own_job, stage, rank)


def run_ray(job: Job, stage: str, ranks: list[int], started: Callable[[], None]) -> None:
    """Run tasks of a stage on the Ray cluster that RAY_ADDRESS names, or on a Ray started here.

    Raises InputError with the first task's problem; those under way are finished, the others are not begun.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError:
        raise InputError("data.executor: ray is not installed; pip install 'tinyllama[ray]', or say local") from None
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    started()
    workers = len(ranks) if job.recipe.data.workers == "auto" else job.recipe.data.workers
    try:
        _run_on(ray, job, stage, ranks, workers)
    finally:
        if is_ours:
            ray.shutdown()


def _run_on(ray: Any, job: Job, stage: str, ranks: list[int], workers: int) -> None:
    """A core for each task; Ray itself does one again whose worker or machine is lost, three times at most."""
    begin, shared = ray.remote(num_cpus=1, max_retries=3)(run_rank).remote, ray.put(job)
    waiting, under_way, problems = ranks[::-1], list[Any](), list[InputError]()
    while under_way or (waiting and not problems):
        while waiting and not problems and len(under_way) < workers:
            under_way.append(begin(shared, stage, waiting.pop()))
        (ended,), under_way = ray.wait(under_way)
        try:
            ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, InputError):
                raise
            problems.append(error.cause)
        except ray.exceptions.RayError:
            problems.append(_killed(job))
    if problems:
        raise problems[0]


def _run_datatrove_rank(job: Job, stage: str, ranks: list[int], data: Any, rank: int, world: int) -> None:
    """A datatrove step that does one of the tasks that are left."""
    run_rank(job, stage, ranks[rank])


def submit_slurm(job: Job, pending: dict[str, list[int]], finish: Callable[..., None]) -> list[str]:
    """Submit the stages that have tasks left as job arrays, each after the one before, and `finish` after all.

    Returns the jobs' numbers. Raises InputError where there is no sbatch, or where it refuses.
    """
    steps = {
        stage: (partial(_run_datatrove_rank, job, stage, ranks), len(ranks))
        for stage, ranks in pending.items()
        if ranks
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
