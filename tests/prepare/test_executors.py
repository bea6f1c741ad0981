"""Whoever runs the tasks, and whatever happens to them, the store is the same and the message is clear."""

import gzip
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import contents, interrupt, python_sources, write_jsonl

from tinyllama.data.store import TokenStore
from tinyllama.data.verification import find_corruption
from tinyllama.errors import InputError
from tinyllama.prepare.pipeline import prepare_store
from tinyllama.recipe import Recipe

pytestmark = pytest.mark.slow

SBATCH = """#!/bin/bash
# Runs every task of the array on the spot, as Slurm would one day; none where the job before has failed.
script="${@: -1}"
number=$(ls "$JOBS"/*.slurm 2>/dev/null | wc -l)
cp "$script" "$JOBS/$number.slurm"
echo "$@" > "$JOBS/$number.arguments"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
before=$(sed -n 's/.*--dependency=afterok:\\([0-9]*\\).*/\\1/p' "$JOBS/$number.arguments")
[[ -n $before && -e $JOBS/$((before - 100)).failed ]] && last=-1
for task in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$task RUN_OFFSET=0 SLURM_NODELIST=here bash "$script" >> "$JOBS/$number.output" 2>&1 ||
        touch "$JOBS/$number.failed"
done
echo "Submitted batch job $((number + 100))"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo here
"""
SQUEUE = """#!/bin/bash
cat "$JOBS/queue"
"""
LOSING = """
# Every Python begins with this: that of one task is killed when it has written half a shard, if {condition}.
import os, signal
from pathlib import Path

def dying(fd, fsync=os.fsync):
    path = os.readlink(f"/proc/self/fd/{{fd}}")
    if "modules/train/{shard}.tokens" in path and {condition}:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)

os.fsync = dying
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Eight files, so that there are eight tasks."""
    texts = python_sources(48)
    for number in range(8):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts[number * 6 : number * 6 + 6])
    return tmp_path / "raw"


@pytest.fixture
def recipe(small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)  # a task a file
    return recipe_at(small, raw, tmp_path / "store")


def recipe_at(small: Path, raw: Path, store: Path, **overrides: Any) -> Recipe:
    fields = {"data.store": str(store), "data.sources.modules.path": str(raw), **overrides}
    return Recipe.load(small / "recipe.yaml", fields)


@pytest.fixture
def wanted(recipe: Recipe, small: Path, raw: Path, tmp_path: Path) -> dict[str, bytes]:
    prepare_store(recipe_at(small, raw, tmp_path / "wanted"))
    return contents(tmp_path / "wanted")


def programs(folder: Path, **scripts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)


@pytest.mark.cluster
def test_slurm_jobs_write_the_same_store(
    recipe: Recipe, wanted: dict[str, bytes], small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", sbatch=SBATCH, srun=SRUN, scontrol=SCONTROL)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path / "bin"))
    slurm = {"partition": "cpu", "time": "02:00:00", "memory_gigabytes": 3, "arguments": {"account": "tiny"}}
    on_slurm = recipe_at(small, raw, tmp_path / "store", **{"data.executor": "slurm", "data.slurm": slurm})
    assert prepare_store(on_slurm) is None
    assert contents(tmp_path / "store") == wanted, (tmp_path / "bin/0.output").read_text()
    script = (tmp_path / "bin/0.slurm").read_text()
    for option in ("array=0-8%1", "partition=cpu", "time=02:00:00", "mem-per-cpu=3G", "account=tiny"):
        assert f"#SBATCH --{option}\n" in script
    assert "launch_pickled_pipeline" in script
    assert any("--dependency=afterok:" in path.read_text() for path in (tmp_path / "bin").glob("*.arguments"))
    opened = prepare_store(on_slurm)  # once it is there, it is opened
    assert opened is not None
    assert opened.digest == TokenStore.open(tmp_path / "wanted").digest


@pytest.mark.cluster
def test_a_slurm_task_that_is_lost_makes_no_store_and_is_done_alone_the_next_time(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = python_sources(12)
    for number in range(2):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts[number * 6 : number * 6 + 6])
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)
    programs(tmp_path / "bin", sbatch=SBATCH, srun=SRUN, scontrol=SCONTROL, squeue=SQUEUE)
    (tmp_path / "bin/queue").touch()
    on_a_node = "'SLURM_ARRAY_TASK_ID' in os.environ"
    (tmp_path / "bin/sitecustomize.py").write_text(LOSING.format(shard="00001", condition=on_a_node))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path / "bin"))
    slurm = {"data.executor": "slurm", "data.slurm": {"partition": "cpu"}}
    on_slurm = recipe_at(small, tmp_path / "raw", tmp_path / "store", **slurm)
    with monkeypatch.context() as losing:
        losing.setenv("PYTHONPATH", str(tmp_path / "bin"))
        assert prepare_store(on_slurm) is None
    assert (tmp_path / "bin/0.failed").exists()
    with pytest.raises(InputError, match="is not finished"):
        TokenStore.open(tmp_path / "store")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/train/*.tokens")}
    assert sorted(path.parent.parent.name for path in done) == ["lines", "modules"]
    assert prepare_store(on_slurm) is None
    assert "#SBATCH --array=0-0%1\n" in (tmp_path / "bin/4.slurm").read_text()  # 0 to 3: the first time
    assert {path: path.stat().st_mtime_ns for path in done} == done, "done work is not done again"
    prepare_store(recipe_at(small, tmp_path / "raw", tmp_path / "wanted"))
    assert contents(tmp_path / "store") == contents(tmp_path / "wanted"), (tmp_path / "bin/4.output").read_text()


@pytest.mark.cluster
def test_slurm_jobs_under_way_are_not_submitted_twice(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = SBATCH.partition("last=")[0] + 'echo "Submitted batch job 7"\n'
    programs(tmp_path / "bin", sbatch=waiting, squeue=SQUEUE)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path / "bin"))
    (tmp_path / "bin/queue").write_text("7 cpu PENDING\n")
    on_slurm = recipe_at(
        small, raw, tmp_path / "store", **{"data.executor": "slurm", "data.slurm": {"partition": "cpu"}}
    )
    assert prepare_store(on_slurm) is None
    with pytest.raises(InputError, match=r"Slurm jobs 7,7 are not finished; wait for them"):
        prepare_store(on_slurm)
    (tmp_path / "bin/queue").write_text("")
    assert prepare_store(on_slurm) is None


def test_slurm_without_its_program_or_its_settings_says_so(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # as where no Slurm is installed
    with pytest.raises(InputError, match=r"data: executor slurm needs data.slurm, with its partition"):
        recipe_at(small, raw, tmp_path / "store", **{"data.executor": "slurm"})
    on_slurm = recipe_at(
        small, raw, tmp_path / "store", **{"data.executor": "slurm", "data.slurm": {"partition": "cpu"}}
    )
    with pytest.raises(InputError, match=r"no sbatch here; run this on a login node"):
        prepare_store(on_slurm)


@pytest.mark.cluster
def test_local_ray_resumes_and_retries_killed_worker(
    recipe: Recipe, wanted: dict[str, bytes], small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")

    interrupt(recipe, monkeypatch, after=5)
    assert len(list((tmp_path / "store/.work/receipts").rglob("*.json"))) == 5
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "store/modules/train").glob("*.tokens")}
    assert len(shards) == 5
    once = f"not (Path({str(tmp_path)!r}) / 'killed').exists() and not (Path({str(tmp_path)!r}) / 'killed').touch()"
    (tmp_path / "sitecustomize.py").write_text(LOSING.format(shard="00006", condition=once))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    store = prepare_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray", "data.workers": 2}))
    assert store is not None
    assert (tmp_path / "killed").exists()
    assert contents(tmp_path / "store") == wanted
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "done work is not done again"


@pytest.mark.cluster
def test_on_ray_an_unreadable_file_stops_with_its_name_and_sigterm_does_what_it_did(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    (raw / "3.jsonl.gz").write_bytes(gzip.compress((raw / "3.jsonl").read_bytes())[:-20])
    with pytest.raises(InputError, match=r"3.jsonl.gz: cannot be read to its end"):
        prepare_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray", "data.workers": 2}))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.cluster
def test_on_ray_a_task_whose_worker_is_killed_each_time_is_one_line(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    (tmp_path / "sitecustomize.py").write_text(LOSING.format(shard="00003", condition=True))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match=r"store: a worker was killed, possibly out of memory; run prepare again"):
        prepare_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray"}))
    done = {path.name for path in (tmp_path / "store/.work/receipts").rglob("*.json")}
    assert "modules.train.00003.json" not in done
    assert done


@pytest.mark.cluster
def test_on_ray_tasks_that_write_to_another_machines_folder_are_one_line(
    recipe: Recipe, small: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("tinyllama.prepare.executors.run_task", lambda job, stage, rank: None)
    with pytest.raises(InputError, match=r"task 0 of tokens ended without a completion record here"):
        prepare_store(recipe_at(small, raw, tmp_path / "store", **{"data.executor": "ray"}))


def command_at(small: Path, raw: Path, store: Path) -> list[str]:
    flags = ["--data.sources.modules.path", str(raw), "--data.store", str(store)]
    return [sys.executable, "-m", "tinyllama", "prepare", str(small / "recipe.yaml"), *flags, "--data.workers", "2"]


def test_worker_killed_by_kernel_is_reported_and_loses_nothing(small: Path, tmp_path: Path) -> None:
    texts = python_sources(150)
    for number in range(6):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts)
    command = command_at(small, tmp_path / "raw", tmp_path / "store")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 2:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith(
        f"tinyllama: {tmp_path / 'store'}: a worker was killed, possibly out of memory"
    )
    assert "Traceback" not in said
    subprocess.run(command, check=True, capture_output=True)
    assert find_corruption(tmp_path / "store") == []


def test_a_full_disk_stops_with_one_line_and_loses_nothing(small: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs a mount namespace for a disk that is full")
    texts = python_sources(150)
    for number in range(6):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = " ".join(command_at(small, tmp_path / "raw", disk / "store"))
    script = f"""
        mount -t tmpfs -o size=6m none {disk}
        {command} 2> {tmp_path}/said; echo $? > {tmp_path}/status
        ls {disk}/store/.work/receipts/tokens > {tmp_path}/done
        mount -o remount,size=200m {disk}
        {command} && cp -r {disk}/store {tmp_path}/mended
    """
    subprocess.run(["unshare", "-rm", "sh", "-c", script], check=True, capture_output=True)
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "status").read_text() == "2\n"
    assert said.splitlines()[-1] == (
        f"tinyllama: {disk}/store: not writable (No space left on device); free some space and run prepare again, "
        "which resumes from here"
    )
    assert "Traceback" not in said
    assert (tmp_path / "done").read_text().count(".json") > 0
    subprocess.run(command_at(small, tmp_path / "raw", tmp_path / "calm"), check=True, capture_output=True)
    assert contents(tmp_path / "mended") == contents(tmp_path / "calm")
