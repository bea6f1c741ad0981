"""The command that continues the work, where no other test runs the command before it."""

from pathlib import Path

from tinyllama.cli.next_command import after_evaluation


def test_scores_of_a_run_lead_to_its_report_and_other_scores_to_a_text(tmp_path: Path) -> None:
    release = tmp_path / "my run/releases/step-00000012"
    release.mkdir(parents=True)
    (tmp_path / "my run/events.jsonl").touch()
    assert after_evaluation(str(release), release / "evaluation.json") == f"tinyllama report '{tmp_path}/my run'"
    expected = f"tinyllama generate {tmp_path}/other 'Once upon a time'"
    assert after_evaluation(f"{tmp_path}/other", tmp_path / "other/evaluation.json") == expected
