"""Executors, which run the tasks of a stage in processes of this machine, on a Ray cluster, or as Slurm jobs.

All three executors call `tasks.run_task`. Only completion records show which tasks are finished. The local pool comes
from concurrent.futures, because datatrove's pool waits permanently for a worker that the kernel has killed. Ray is
called directly, because datatrove's executor forks a pool in each Ray worker, and this pool sometimes hangs at its end.
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.hardware import available_cpu_count
from tinyllama.prepare.tasks import Job, run_task
from tinyllama.processes import set_parent_death_signal

_RAY_RETRIES = 3
"""Maximum number of times that Ray repeats a task after the loss of its worker."""
_MAX_SLURM_ARRAY = 1000
"""Largest job array: Slurm's MaxArraySize is 1001 by default."""


def run_local(job: Job, stage: str, ranks: list[int], started: Callable[[], None]) -> None:
    """Run tasks of a stage in processes of this machine; call `started` once the processes exist.

    If a task fails, no more tasks are started. Raises InputError with the first problem after all running tasks have
    finished.
    """
    workers = min(len(ranks), available_cpu_count() if job.recipe.data.workers == "auto" else job.recipe.data.workers)
    if workers <= 1:
        started()
        for rank in ranks:
            run_task(job, stage, rank)
        return
    context = multiprocessing.get_context("fork")  # workers inherit the tokenizer, which saves one second
    with ProcessPoolExecutor(workers, context, _init_worker, (job,)) as pool:
        futures = [pool.submit(_run_task_in_worker, stage, rank) for rank in ranks]
        started()
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            # After a call without waiting, the end of the `with` block would not wait either.
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise _worker_killed_error(job) from None
            raise


def _worker_killed_error(job: Job) -> InputError:
    return InputError(
        f"{job.store}: a worker was killed, possibly because memory ran out; to resume, run prepare again with "
        "fewer data.workers"
    )


_worker_job: Job


def _init_worker(job: Job) -> None:
    global _worker_job  # noqa: PLW0603 - a pool's worker has no other place for shared data
    _worker_job = job
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # which end a worker without a traceback
        signal.signal(number, signal.SIG_DFL)
    set_parent_death_signal()


def _run_task_in_worker(stage: str, rank: int) -> None:
    run_task(_worker_job, stage, rank)


def run_ray(job: Job, stage: str, ranks: list[int], started: Callable[[], None]) -> None:
    """Run tasks of a stage on the Ray cluster that RAY_ADDRESS names, or on a new Ray cluster on this machine.

    The cluster's machines need this package and access to the recipe's paths. If a task fails, no more tasks are
    started. Raises InputError with the first problem after all submitted tasks have finished.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError:
        raise InputError(
            "data.executor: ray is not installed; pip install 'tinyllama[ray]', or set data.executor to local"
        ) from None
    with _ray_session(ray):
        started()
        _run_on_ray(ray, job, stage, ranks)
    if lost := [rank for rank in job.unfinished(stage) if rank in ranks]:
        raise InputError(
            f"{job.work}: task {lost[0]} of {stage} ended, but its completion record is not here; mount this folder on "
            "every machine of the Ray cluster, under the same absolute path"
        )


@contextmanager
def _ray_session(ray: Any) -> Iterator[None]:
    """Use the Ray session of this process, or start one for the block and restore the SIGTERM handler afterwards."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_task_oom_retries", str(_RAY_RETRIES))  # Ray's default is unlimited
    sigterm_handler = signal.getsignal(signal.SIGTERM)  # replaced by ray.init
    ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm_handler)


def _run_on_ray(ray: Any, job: Job, stage: str, ranks: list[int]) -> None:
    """Run tasks with one core and one gibibyte each; Ray retries a task after the loss of its worker."""
    submit, shared = ray.remote(num_cpus=1, memory=1 << 30, max_retries=_RAY_RETRIES)(run_task).remote, ray.put(job)
    waiting, running, problem = ranks[::-1], list[Any](), None
    try:
        while running or (waiting and not problem):
            while waiting and not problem and len(running) < _max_in_flight(ray, job):
                running.append(submit(shared, stage, waiting.pop()))
            (ended,), running = ray.wait(running)
            problem = problem or _task_problem(ray, job, ended)
    finally:
        for task in running:
            ray.cancel(task, force=True)
    if problem:
        raise problem


def _max_in_flight(ray: Any, job: Job) -> int:
    """Return the maximum number of tasks that are submitted to Ray at a time.

    With `auto`, the maximum is twice the cluster's number of cores. An autoscaling cluster adds nodes for the tasks
    that wait for a core.
    """
    workers = job.recipe.data.workers
    return max(1, 2 * int(ray.cluster_resources().get("CPU", 0))) if workers == "auto" else workers


def _task_problem(ray: Any, job: Job, task: Any) -> InputError | None:
    """Return the InputError that a task raised, or an InputError if its worker was lost; None if the task succeeded.

    Raises every other error of the task.
    """
    errors = ray.exceptions
    try:
        ray.get(task)
    except errors.RayTaskError as error:
        if not isinstance(error.cause, InputError):
            raise
        return error.cause
    except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError):
        return _worker_killed_error(job)
    return None


def _run_slurm_task(job: Job, stage: str, ranks: list[int], data: Any, rank: int, world_size: int) -> None:
    """Run the task `ranks[rank]`, as a step of a datatrove pipeline."""
    run_task(job, stage, ranks[rank])


def submit_slurm(job: Job, finish: Callable[..., None]) -> None:
    """Submit the unfinished tasks of each stage as a job array, and `finish` as the last job.

    Each job array waits for the array of the previous stage. The job numbers are recorded, so that a second run does
    not submit the same tasks again. Raises InputError if sbatch is missing or fails.
    """
    pending = {stage: job.unfinished(stage) for stage in job.stages}
    steps = {
        stage: (partial(_run_slurm_task, job, stage, ranks), len(ranks)) for stage, ranks in pending.items() if ranks
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
    write_json(job.slurm / "submitted.json", numbers)


def _slurm_executor(job: Job, name: str, step: Callable[..., None], tasks: int, before: str | None) -> Any:
    from datatrove.executor.slurm import SlurmPipelineExecutor  # noqa: PLC0415 - the import takes 0.5 s

    slurm, workers = job.recipe.data.slurm, job.recipe.data.workers
    assert slurm is not None  # validated by the recipe
    programs = shlex.quote(str(Path(sys.executable).parent))
    return SlurmPipelineExecutor(
        pipeline=[step],
        tasks=tasks,
        tasks_per_job=-(-tasks // _MAX_SLURM_ARRAY),
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


def refuse_submitted(job: Job) -> None:
    """Raise InputError if jobs of this store are pending or running in Slurm."""
    if job.recipe.data.executor != "slurm" or not (job.slurm / "submitted.json").is_file():
        return
    numbers = ",".join(read_json(job.slurm / "submitted.json"))
    command = ["squeue", "--noheader", "--jobs", numbers]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # fails if jobs have ended
    except FileNotFoundError:
        raise InputError("data.executor: no squeue here; run this on a login node of the Slurm cluster") from None
    if found.returncode == 0 and found.stdout.strip():
        raise InputError(f"{job.store}: Slurm jobs {numbers} are not finished; wait for them, or scancel them first")
