"""The end of a run: the note with the step to resume from."""

from pathlib import Path

import pytest
from tests.tracking.run_files import new_run, write_steps

from tinyllama.errors import RunStoppedError
from tinyllama.files import write_json
from tinyllama.train.run_end import log_run_end


@pytest.mark.parametrize(
    ("saved_step", "note"),
    [(None, "from step 0 (4 steps lost)"), (3, "from step 3 (1 step lost)"), (4, None)],
    ids=["no checkpoint", "lost step", "all steps"],
)
def test_error_has_the_step_to_resume_from_unless_all_steps_are_saved(
    tmp_path: Path, saved_step: int | None, note: str | None
) -> None:
    run, log = new_run(tmp_path)
    write_steps(log, 1, 4)
    if saved_step:
        write_json(run.checkpoint(saved_step).commit_path, {})
    with pytest.raises(RunStoppedError) as raised, log_run_end(log, 4):
        raise RunStoppedError("stopped")
    notes = getattr(raised.value, "__notes__", [])
    assert notes == ([f"training resumes {note}"] if note else [])
    assert [event["event"] for event in run.events()][-1] == "failed"
