"""The live page in a real browser while a real process trains, and its publication on a fake hub."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from playwright.sync_api import Page
from tests.browser import DESKTOP, PHONE, keep_screenshot, opened
from tests.release.hub import TOKEN, running_hub
from tests.tracking.run_files import BATCH_TOKENS, new_run, write_release, write_steps

from tinyllama.errors import InputError
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking import watch as watch_module
from tinyllama.tracking.watch import watch

pytestmark = pytest.mark.slow

_ENDLESS_STEPS = 1_000_000
PROGRAM = Path(__file__).with_name("interruptible_program.py")


@contextmanager
def running(folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the program until the block ends."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                process.kill()


@contextmanager
def watched(folder: Path, run: str = "runs/small") -> Iterator[str]:
    """Serve the page; yield its address."""
    with running(folder, "watch", run, "--no-open-browser") as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\S*", process.stdout.readline())
        assert found, process.poll()
        yield found[0]
    assert process.returncode == 0


def wait_for(page: Page, condition: str) -> dict[str, Any]:
    """Wait for a condition on the page's own description of what it shows; return that."""
    handle = page.wait_for_function(
        f"() => {{ const shown = window.trackio?.getViewState(); return ({condition}) && shown }}", timeout=60_000
    )
    found: dict[str, Any] = handle.json_value()
    return found


def picture(page: Page, metric: str) -> str:
    """Return a chart as drawn at this moment."""
    canvas = f"document.querySelector('.plot-container[data-metric=\"{metric}\"] canvas')"
    return str(page.evaluate(f"() => {canvas}?.toDataURL() ?? ''"))


@pytest.fixture(scope="module")
def training(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which an endless run is training with trackio."""
    folder = tmp_path_factory.mktemp("training")
    fields = ["--track.trackio", "true", "--train.tokens", _ENDLESS_STEPS * BATCH_TOKENS]
    quiet = ["--checkpoint.every_steps", 10**6, "--train.validate_every_steps", 50]
    with running(folder, "train", small / "recipe.yaml", *fields, *quiet):
        for _ in range(600):
            if (folder / "runs/small/trackers/trackio.json").is_file():
                break
            time.sleep(0.1)
        else:
            pytest.fail("nothing was shown within a minute")
        yield folder


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE), ("dark", PHONE)])
def test_curve_of_a_training_run_grows_without_reload(
    training: Path, scheme: Literal["light", "dark"], size: tuple[int, int]
) -> None:
    with watched(training) as address, opened(address, scheme, size) as seen:
        page = seen.page
        shown = wait_for(page, "shown?.latest_x > 0 && shown.metrics.includes('validation_loss')")
        page.wait_for_function("() => document.querySelector('[data-metric=\"loss\"] canvas')")
        before = picture(page, "loss")
        later = wait_for(page, f"shown.latest_x > {shown['latest_x']}")
        for _ in range(100):  # drawn a moment later
            if picture(page, "loss") not in (before, ""):
                break
            page.wait_for_timeout(200)
        else:
            pytest.fail("the picture stayed as it was")
        assert sum("/?project=" in address for address in seen.requests) == 1  # never reloaded
        assert (later["x_axis"], later["smoothing"]) == ("tokens", 20)
        assert later["metrics"][:3] == ["loss", "validation_loss", "validation_bits_per_byte"]
        assert seen.external_requests() == []
        dark = page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert dark == (scheme == "dark")
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        keep_screenshot(page, f"watch-{'phone' if size == PHONE else 'desktop'}-{scheme}")


def test_a_run_without_a_tracker_is_shown_from_its_files(tmp_path: Path, run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 30)
    log.event("release", 10, folder="releases/step-00000010")
    with watched(tmp_path) as address, opened(address) as seen:
        shown = wait_for(seen.page, f"shown?.latest_x == {30 * BATCH_TOKENS}")
        assert {entry["name"] for entry in shown["runs"]} == {"small", "releases of small", "trouble of small"}
        write_steps(log, 31, 40)
        write_release(run, 10, 30.0, [{"name": "Big", "hellaswag": 60.0, "source": "published, a card"}])
        shown = wait_for(seen.page, "shown.metrics.some(name => name.startsWith('scores/hellaswag'))")
        shown = wait_for(seen.page, f"shown.latest_x == {40 * BATCH_TOKENS} && shown.runs.length == 4")
        assert "Big (published)" in {entry["name"] for entry in shown["runs"]}
        keep_screenshot(seen.page, "watch-scores")


def test_the_requested_run_is_selected_and_the_others_are_listed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _, log = new_run(tmp_path, name)
        write_steps(log, 1, 30, change=0.2 if name == "two" else 0.0)
        log.event("signal", 20, signal="SIGTERM")
    with watched(tmp_path, "runs/two") as address, opened(address) as seen:
        shown = wait_for(seen.page, "shown?.latest_x > 0")
        assert {entry["id"] for entry in shown["runs"]} == {"two", "two/mark/releases", "two/mark/trouble"}
        seen.page.get_by_text("one", exact=True).click()
        shown = wait_for(seen.page, "shown.runs.length == 4")
        seen.page.wait_for_timeout(500)
        keep_screenshot(seen.page, "watch-compare")


def test_a_folder_that_is_not_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        watch(tmp_path)


@pytest.mark.parametrize("port", [0, 65_536, 99_999])
def test_an_invalid_port_is_an_error(tmp_path: Path, port: int) -> None:
    with pytest.raises(InputError, match=f"--port {port}: "):
        watch(new_run(tmp_path)[0].path, port)


def test_without_a_free_port_the_error_names_the_flag(tmp_path: Path) -> None:
    def show(**_: Any) -> None:
        raise OSError("Cannot find empty port in range: 7860-7959.")

    with pytest.raises(InputError, match=r"--port: .*7860-7959"):
        watch_module._serve(SimpleNamespace(show=show), RunDir(tmp_path), None)


# Publishing, as far as the fake hub goes: it has Spaces but no buckets


def published(folder: Path, space: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Publish in a process of its own, since trackio reads the hub's address when it is imported."""
    command = [sys.executable, "-m", "tinyllama", "watch", "runs/small", "--publish", space, *more]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    _, log = new_run(tmp_path)
    write_steps(log, 1, 30)
    return tmp_path


@pytest.mark.parametrize(("more", "visibility"), [([], "private"), (["--public"], "public")])
def test_publish_creates_a_private_space_by_default(recorded: Path, more: list[str], visibility: str) -> None:
    with running_hub() as hub:
        done = published(recorded, "guild/page", *more, HF_ENDPOINT=hub.url)
        space = hub.repositories["guild/page"]
    assert (space.visibility, {*space.files}) == (visibility, {"README.md", "requirements.txt", "app.py"})
    assert any("/api/buckets" in request for request in hub.requests)  # where the data would go
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "guild/page: " in done.stderr
    assert "403" in done.stderr


def test_errors_of_publishing_are_one_line(recorded: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    with running_hub() as hub:
        cases = [
            ("ada/page", {"HF_TOKEN": "hf_wrong"}, "HF_TOKEN"),
            ("stranger/page", {}, "403"),
            ("ada/page", {"HF_ENDPOINT": nowhere}, f"{nowhere}: cannot be reached"),
            ("page", {}, "--publish page: "),
        ]
        for space, environment, words in cases:
            done = published(recorded, space, **{"HF_ENDPOINT": hub.url} | environment)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert words in done.stderr
