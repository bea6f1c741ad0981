"""Training beside trackers that work, that fail, that block and that never end: real processes, each to its end."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.tracking.recorded import follower, new_run, release, resume, step
from tests.tracking.shown import tensorboard, wandb_rows

from tinyllama.errors import InputError
from tinyllama.files import read_json
from tinyllama.recipe import Recipe, Track
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking import trackers
from tinyllama.tracking.follow import SinkPosition
from tinyllama.tracking.trackers import check_trackers, enabled_trackers

pytestmark = pytest.mark.slow

_STEPS = 12
_TRAIN = """
import sys
from tinyllama.tracking import trackers
trackers.CALL_TIMEOUT_SECONDS, trackers.SHUTDOWN_TIMEOUT_SECONDS = float(sys.argv.pop(1)), float(sys.argv.pop(1))
from tinyllama.cli import main
sys.exit(main())
"""


def train(
    small: Path, folder: Path, *fields: str, fake: str = "", waits: tuple[float, float] = (60, 60), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Train in `folder`; `fake` stands for wandb; `waits`: seconds until a call is told of, and at the end."""
    tokens = str(_STEPS * 6 * 64)
    command = [sys.executable, "-c", _TRAIN, *map(str, waits), "train", str(small / "recipe.yaml"), *fields]
    return subprocess.run(
        [*command, "--train.tokens", tokens],
        cwd=folder,
        env=os.environ | with_fake(folder, fake) | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def with_fake(folder: Path, fake: str) -> dict[str, str]:
    """What the environment needs for a module of that text to be wandb."""
    if not fake:
        return {}
    (folder / "fake").mkdir(exist_ok=True)
    (folder / "fake/wandb.py").write_text(f"Settings = dict\n{fake}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder / "fake"), os.environ.get("PYTHONPATH", "")])}


def told_of(run: Path, name: str, fake: str = "", before: str = "") -> tuple[list[str], int]:
    """The events that a tracker's process tells of, from a run that has ended, and its status."""
    command = [
        sys.executable,
        "-c",
        f"{before}\nimport sys; from tinyllama.tracking.trackers import main; sys.exit(main(*sys.argv[1:]))",
    ]
    environment = os.environ | with_fake(run, fake)
    done = subprocess.run(
        [*command, str(run), name, "60"], input="", capture_output=True, text=True, env=environment, check=False
    )
    return [json.loads(line)["event"] for line in done.stdout.splitlines()], done.returncode


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in RunDir(folder / "runs/small").events() if row["event"] == name]


def weights(folder: Path) -> str:
    commit = read_json(folder / f"runs/small/checkpoints/step-{_STEPS:08}/commit.json")
    return str(commit["sha256"]["__0_0.distcp"])


@pytest.fixture(scope="module")
def untracked(small: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the weights that a run without trackers ends with."""
    folder = tmp_path_factory.mktemp("untracked")
    done = train(small, folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "runs/small/trackers").exists()
    return weights(folder)


def test_trackers_that_work_have_every_step_and_change_no_weight(small: Path, tmp_path: Path, untracked: str) -> None:
    fields = ["--track.trackio", "true", "--track.wandb", "probe", "--track.tensorboard", "true"]
    done = train(small, tmp_path, *fields, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path) == untracked
    run, numbers = tmp_path / "runs/small", list(range(1, _STEPS + 1))
    assert [read_json(run / f"trackers/{name}.json")["step"] for name in enabled_trackers(tracked())] == [_STEPS] * 3
    rows = [row for row in wandb_rows(run) if "loss" in row]
    assert [row["step"] for row in rows] == numbers
    assert [row["loss"] for row in rows] == [row["loss"] for row in RunDir(run).metrics()]
    losses = tensorboard(run).Scalars("loss")
    assert [event.step for event in losses] == numbers
    assert not events(tmp_path, "tracker-failed") + events(tmp_path, "tracker-blocked")


def tracked() -> Track:
    return Track(trackio=True, wandb="probe", tensorboard=True)


def test_a_tracker_that_fails_is_one_event_and_one_line(small: Path, tmp_path: Path, untracked: str) -> None:
    fake = "def init(**more): raise ConnectionError('no page today')"
    done = train(small, tmp_path, "--track.wandb", "probe", fake=fake)
    assert (done.returncode, weights(tmp_path)) == (0, untracked), done.stderr
    (event,) = events(tmp_path, "tracker-failed")
    assert (event["tracker"], event["problem"]) == ("wandb", "ConnectionError: no page today")
    assert done.stderr.count("wandb failed and is not used until the next start: ConnectionError: no page today") == 1


def test_a_trackers_process_that_is_killed_is_an_event_too(small: Path, tmp_path: Path, untracked: str) -> None:
    fake = "import os, signal\ndef init(**more): os.kill(os.getpid(), signal.SIGKILL)"
    done = train(small, tmp_path, "--track.wandb", "probe", fake=fake)
    assert (done.returncode, weights(tmp_path)) == (0, untracked), done.stderr
    assert [event["problem"] for event in events(tmp_path, "tracker-failed")] == ["its process ended with status -9"]


@pytest.mark.parametrize("fake", ["def init(**more): raise SystemExit(3)", "raise ImportError('half installed')"])
def test_however_a_tracker_fails_its_process_says_so(tmp_path: Path, fake: str) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 3)
    assert told_of(run, "wandb", fake) == (["tracker-failed"], 0)


_BLOCKS = {
    "a call": "import time\ndef init(**more): time.sleep(1e6)",
    "a call that holds on to the interpreter": "import ctypes\ndef init(**more): ctypes.PyDLL(None).sleep(1000000)",
}


@pytest.mark.parametrize("fake", _BLOCKS.values(), ids=_BLOCKS.keys())
def test_a_tracker_that_blocks_for_ever_holds_up_neither_training_nor_its_end(
    small: Path, tmp_path: Path, untracked: str, fake: str
) -> None:
    done = train(small, tmp_path, "--track.wandb", "probe", "--track.tensorboard", "true", fake=fake, waits=(1, 6))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path) == untracked
    assert "wandb is still busy; ended without the last rows" in done.stderr
    assert len(tensorboard(tmp_path / "runs/small").Scalars("loss")) == _STEPS  # the other one is none the worse
    if "PyDLL" not in fake:
        assert "wandb" in [event["tracker"] for event in events(tmp_path, "tracker-blocked")]
        assert done.stderr.count("wandb blocks; training continues") == 1


def test_a_tracker_that_will_not_let_the_interpreter_end_is_left(small: Path, tmp_path: Path, untracked: str) -> None:
    fake = "import atexit, time\natexit.register(time.sleep, 1e6)\ndef init(**more): raise ConnectionError('none')"
    done = train(small, tmp_path, "--track.wandb", "probe", fake=fake, waits=(60, 2))
    assert (done.returncode, weights(tmp_path)) == (0, untracked), done.stderr
    assert "wandb is still busy; ended" in done.stderr


def _a_file(page: Path) -> None:
    page.write_text("no folder")


def _garbage(page: Path) -> None:
    page.mkdir()
    (page / "tinyllama.db").write_bytes(b"no database" * 1000)


def _full(page: Path) -> None:
    page.mkdir()
    (page / "tinyllama.db").symlink_to("/dev/full")


def _unreadable(page: Path) -> None:
    page.mkdir()
    (page / "tinyllama.lock").mkdir()


@pytest.mark.parametrize("spoil", [_a_file, _full, _unreadable])
def test_where_trackio_cannot_keep_its_data_its_process_says_so(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 3)
    spoil(run.parent / ".trackio")
    assert told_of(run, "trackio") == (["tracker-failed"], 0)


def test_on_a_network_disk_training_leaves_trackio_to_the_page(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 3)
    folder = run.parent / ".trackio"
    is_network = f"import os; os.environ['TRACKIO_DIR'] = '{folder}'\nimport trackio.utils as utils\n"
    is_network += "utils.is_network_filesystem = lambda path: True"
    assert told_of(run, "trackio", before=is_network) == ([], 0)
    assert not (folder / "tinyllama.db").exists()
    assert told_of(run, "trackio") == ([], 0)
    assert (folder / "tinyllama.db").exists()


def test_data_of_trackios_that_are_corrupted_end_nothing_but_the_page(
    small: Path, tmp_path: Path, untracked: str
) -> None:
    (tmp_path / "runs").mkdir()
    _garbage(tmp_path / "runs/.trackio")
    done = train(small, tmp_path, "--track.trackio", "true")
    assert (done.returncode, weights(tmp_path)) == (0, untracked), done.stderr
    assert [event["tracker"] for event in events(tmp_path, "tracker-failed")] == ["trackio"]


def test_a_tracker_that_is_not_installed_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        return None if name == "wandb" else object()

    monkeypatch.setattr(trackers, "find_spec", missing)
    check_trackers(Track(tensorboard=True))
    with pytest.raises(InputError, match=r"track.wandb: wandb is not installed"):
        check_trackers(tracked())


def test_tensorboard_drops_what_was_trained_before_a_rollback_and_has_events_scores_and_baselines(
    tmp_path: Path,
) -> None:
    from tinyllama.tracking.tensorboard_sink import TensorBoardSink

    run, journal = new_run(tmp_path)
    following = follower(run, TensorBoardSink(RunDir(run), Recipe.load(run / "recipe.yaml"), SinkPosition()))
    step(journal, 1, 25)
    following.poll()
    journal.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    resume(journal, 20)
    step(journal, 21, 23, change=0.5)
    release(run, 10, 30.0, [{"name": "Big", "hellaswag": 60.0, "source": "published, a card"}])
    following.poll()
    following.sink.close()
    shown = tensorboard(run)
    losses = {event.step: event.value for event in shown.Scalars("loss")}
    assert [*losses] == list(range(1, 24))
    assert losses[22] == pytest.approx(1 + 8 / 22 + 0.5)
    assert [event.value for event in shown.Scalars("scores/hellaswag acc_norm")] == [pytest.approx(30.0)]
    texts = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("events")]
    assert "rollback at step 26: spike; checkpoint 20; skipped batches: 24, 25" in texts
    beside = EventAccumulator(str(run / "tensorboard/baselines/Big (published)"))
    beside.Reload()
    line = [(event.step, event.value) for event in beside.Scalars("scores/hellaswag acc_norm")]
    assert line == [(0, 60.0), (40, 60.0)]


def test_wandb_keeps_one_identity_over_all_the_processes_of_a_run(small: Path, tmp_path: Path) -> None:
    fake = (
        "from types import SimpleNamespace as S\nfrom pathlib import Path\nSettings = dict\n"
        "def init(**more):\n"
        "    with Path('identities').open('a') as file: file.write(f\"{more['id']} {more['project']}\\n\")\n"
        "    log = lambda row, **more: Path('rows').open('a').write(f\"{row['step']}\\n\")\n"
        "    nothing = lambda *a, **k: None\n"
        "    return S(define_metric=nothing, log=log, finish=nothing, config={}, offline=False, starting_step=0)\n"
    )
    for _ in range(2):
        assert train(small, tmp_path, "--track.wandb", "probe", fake=fake).returncode == 0
        # As if killed before it: it goes on from the one before.
        shutil.rmtree(tmp_path / f"runs/small/checkpoints/step-{_STEPS:08}")
    first, second = (tmp_path / "identities").read_text().splitlines()
    assert first == second
    assert first.endswith(" probe")
    assert (tmp_path / "rows").read_text().split() == [str(number) for number in range(1, _STEPS + 1)]
