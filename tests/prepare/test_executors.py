"""Every executor writes the same store, and a killed worker loses no completed work."""

import gzip
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import contents, interrupt, python_sources, write_jsonl

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.tasks import Job, run_task
from tinyllama.recipe import Recipe

pytestmark = pytest.mark.slow

SLURM = Path(__file__).parent / "slurm"
KILLED_WORKER = Path(__file__).parent / "killed_worker"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write eight files, which give eight tasks."""
    texts = python_sources(48)
    for number in range(8):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts[number * 6 : number * 6 + 6])
    return tmp_path / "raw"


@pytest.fixture
def recipe(small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)  # one task per file
    return recipe_at(small, raw, tmp_path / "store")


def recipe_at(small: Path, raw: Path, store: Path, **overrides: Any) -> Recipe:
    fields = {"data.store": str(store), "data.sources.modules.path": str(raw), **overrides}
    return Recipe.load(small / "recipe.yaml", fields)


@pytest.fixture
def wanted(recipe: Recipe, small: Path, raw: Path, tmp_path: Path) -> dict[str, bytes]:
    build_store(recipe_at(small, raw, tmp_path / "wanted"))
    return contents(tmp_path / "wanted")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put programs in place of Slurm's; return the folder of their scripts, outputs and queue."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{SLURM}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(folder))
    return folder


@pytest.mark.cluster
def test_slurm_jobs_write_the_same_store(
    recipe: Recipe, wanted: dict[str, bytes], small: Path, raw: Path, tmp_path: Path, jobs: Path
) -> None:
    slurm = {"partition": "cpu", "time": "02:00:00", "memory_gigabytes": 3, "arguments": {"account": "tiny"}}
    on_slurm = recipe_at(small, raw, tmp_path / "store", **{"data.executor": "slurm", "data.slurm": slurm})
    assert build_store(on_slurm) is None
    assert contents(tmp_path / "store") == wanted, (jobs / "0.output").read_text()
    script = (jobs / "0.slurm").read_text()
    for option in ("array=0-8%1", "partition=cpu", "time=02:00:00", "mem-per-cpu=3G", "account=tiny"):
        assert f"#SBATCH --{option}\n" in script
    assert "launch_pickled_pipeline" in script
    assert any("--dependency=afterok:" in path.read_text() for path in jobs.glob("*.arguments"))
    opened = build_store(on_slurm)
    assert opened is not None
    assert opened.digest == TokenStore.open(tmp_path / "wanted").digest


@pytest.mark.cluster
def test_a_lost_slurm_task_alone_is_repeated(
    small: Path, tmp_path: Path, jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = python_sources(12)
    for number in range(2):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts[number * 6 : number * 6 + 6])
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)
    slurm = {"data.executor": "slurm", "data.slurm": {"partition": "cpu"}}
    on_slurm = recipe_at(small, tmp_path / "raw", tmp_path / "store", **slurm)
    with monkeypatch.context() as losing:
        losing.setenv("PYTHONPATH", f"{KILLED_WORKER}:{os.environ.get('PYTHONPATH', '')}")
        losing.setenv("KILLED_SHARD", "00001")
        losing.setenv("KILLED_WITH", "SLURM_ARRAY_TASK_ID")
        assert build_store(on_slurm) is None
    assert (jobs / "0.failed").exists()
    with pytest.raises(InputError, match="is not finished"):
        TokenStore.open(tmp_path / "store")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/train/*.tokens")}
    assert sorted(path.parent.parent.name for path in done) == ["lines", "modules"]
    assert build_store(on_slurm) is None
    assert "#SBATCH --array=0-0%1\n" in (jobs / "4.slurm").read_text()  # jobs 0 to 3 are of the first call
    assert {path: path.stat().st_mtime_ns for path in done} == done, "done again"
    build_store(recipe_at(small, tmp_path / "raw", tmp_path / "wanted"))
    assert contents(tmp_path / "store") == contents(tmp_path / "wanted"), (jobs / "4.output").read_text()


@pytest.mark.cluster
def test_slurm_jobs_are_not_submitted_twice(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLD_JOBS", "1")
    (jobs / "queue").write_text("100 cpu PENDING\n")
    on_slurm = recipe_at(
        small, raw, tmp_path / "store", **{"data.executor": "slurm", "data.slurm": {"partition": "cpu"}}
    )
    assert build_store(on_slurm) is None
    with pytest.raises(InputError, match=r"Slurm jobs [\d,]+ are not finished; wait for them"):
        build_store(on_slurm)
    (jobs / "queue").write_text("")
    assert build_store(on_slurm) is None


def test_slurm_without_sbatch_or_settings_is_refused(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"data: executor slurm needs data.slurm, with its partition"):
        recipe_at(small, raw, tmp_path / "store", **{"data.executor": "slurm"})
    on_slurm = recipe_at(
        small, raw, tmp_path / "store", **{"data.executor": "slurm", "data.slurm": {"partition": "cpu"}}
    )
    with pytest.raises(InputError, match=r"no sbatch here; run this on a login node"):
        build_store(on_slurm)


@pytest.mark.cluster
def test_ray_resumes_and_repeats_the_task_of_a_killed_worker(
    recipe: Recipe, wanted: dict[str, bytes], small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")

    interrupt(recipe, monkeypatch, after=5)
    assert len(list((tmp_path / "store/.work/completion_records").rglob("*.json"))) == 5
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "store/modules/train").glob("*.tokens")}
    assert len(shards) == 5
    monkeypatch.setenv("PYTHONPATH", f"{KILLED_WORKER}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("KILLED_SHARD", "00006")
    monkeypatch.setenv("KILLED_ONCE", str(tmp_path / "killed"))
    store = build_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray", "data.workers": 2}))
    assert store is not None
    assert (tmp_path / "killed").exists()
    assert contents(tmp_path / "store") == wanted
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "done again"


@pytest.mark.cluster
def test_ray_names_an_unreadable_file_and_restores_sigterm(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    (raw / "3.jsonl.gz").write_bytes(gzip.compress((raw / "3.jsonl").read_bytes())[:-20])
    with pytest.raises(InputError, match=r"3.jsonl.gz: cannot be read"):
        build_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray", "data.workers": 2}))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.cluster
def test_ray_gives_up_on_a_task_whose_worker_is_always_killed(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", f"{KILLED_WORKER}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("KILLED_SHARD", "00003")
    with pytest.raises(
        InputError, match=r"store: a worker was killed, possibly because memory ran out; to resume, run prepare again"
    ):
        build_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray"}))
    done = {path.name for path in (tmp_path / "store/.work/completion_records").rglob("*.json")}
    assert "modules.train.00003.json" not in done
    assert done


@pytest.mark.cluster
def test_ray_without_a_shared_folder_is_refused(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    ray.init(log_to_driver=False, include_dashboard=False)
    monkeypatch.setattr("tinyllama.prepare.executors.run_task", lambda job, stage, rank: None)
    with pytest.raises(InputError, match=r"task 0 of tokens ended, but its completion record is not here"):
        build_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray"}))
    assert ray.is_initialized()  # the session belongs to the caller
    ray.shutdown()


def test_a_killed_worker_is_reported_and_loses_nothing(
    recipe: Recipe, wanted: dict[str, bytes], small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_or_die(job: Job, stage: str, rank: int) -> None:
        if rank == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        run_task(job, stage, rank)

    two_workers = recipe_at(small, raw, tmp_path / "store", **{"data.workers": 2})
    with monkeypatch.context() as patch:
        patch.setattr("tinyllama.prepare.executors.run_task", run_or_die)
        with pytest.raises(InputError, match=r"store: a worker was killed, possibly because memory ran out"):
            build_store(two_workers)
    assert any((tmp_path / "store/.work/completion_records").rglob("*.json"))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "store/modules/train").glob("0000[0-2].tokens")}
    build_store(two_workers)
    assert contents(tmp_path / "store") == wanted
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "done again"
