"""What is done at a milestone of a run: release, score, score the baselines; in a process of its own beside training.

Each part that is there already is left as it is, so doing it again after a failure or a kill goes on where it stood.
"""

from pathlib import Path

from tinyllama.errors import run_and_get_exit_status
from tinyllama.evaluate.evaluation import evaluate, evaluate_and_save
from tinyllama.model.llama import PRECISIONS
from tinyllama.progress import set_quiet
from tinyllama.recipe import Recipe
from tinyllama.release import release, rewrite_cards
from tinyllama.release.index import baseline_file, baseline_scores, evaluation_of, is_release_of, is_scored
from tinyllama.runs.checkpoint import checkpoint_folder
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir


def release_milestone(run: Path, step: int) -> None:
    """Release the checkpoint of a step and score it and the recipe's baselines, as far as that is not done."""
    folder, recipe = run / "releases" / checkpoint_folder(run, step).name, Recipe.load(run / "recipe.yaml")
    if not is_release_of(folder, checkpoint_folder(run, step)):
        release(run, step=step, force=(folder / "release.json").is_file())
    elif step not in {row["step"] for row in RunDir(run).events() if row["event"] == "release"}:
        RunLog(RunDir(run)).event("release", step, folder=str(folder))  # killed before it could say so
    wanted, precision = recipe.release, PRECISIONS[recipe.train.precision]
    if not is_scored(evaluation_of(folder), wanted.model_dump()):
        evaluate_and_save(str(folder), wanted.tasks, wanted.limit, precision)
    for name in wanted.baselines:
        if not is_scored(baseline_scores(folder.parent, name), wanted.model_dump()):
            scores = evaluate(name, wanted.tasks, limit=wanted.limit, precision=precision)
            scores.save(baseline_file(folder.parent, name))
    rewrite_cards(folder.parent)


def main(run: str, step: str) -> int:
    """Return the process's exit status; a line on standard error says why it failed.

    2 is for wrong input alone, which training does not try again: a full disk may be free a minute later.
    """
    set_quiet()  # what is said last is why it failed
    return run_and_get_exit_status(lambda: release_milestone(Path(run), int(step)), system_status=1)
