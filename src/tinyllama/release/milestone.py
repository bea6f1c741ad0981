"""What is done at a milestone of a run: release, score, score the baselines; in a process of its own beside training.

Each part that is there already is left as it is, so doing it again after a failure or a kill goes on where it stood.

    python -m tinyllama.release.milestone RUN STEP
"""

import sys
from pathlib import Path

from tinyllama.cli import run_to_status
from tinyllama.evaluate import evaluate
from tinyllama.evaluate.report import evaluate_and_save
from tinyllama.model.llama import PRECISIONS
from tinyllama.processes import end_with_parent
from tinyllama.recipe import Recipe
from tinyllama.release import refresh_cards, release
from tinyllama.release.table import baseline_file, evaluation_of, is_scored
from tinyllama.train.checkpoint import checkpoint_folder


def release_milestone(run: Path, step: int) -> None:
    """Release the checkpoint of a step and score it and the recipe's baselines, as far as that is not done."""
    folder, recipe = run / "releases" / checkpoint_folder(run, step).name, Recipe.load(run / "recipe.yaml")
    if not (folder / "release.json").is_file():
        release(run, step=step)
    wanted, precision = recipe.release, PRECISIONS[recipe.train.precision]
    if not is_scored(evaluation_of(folder), wanted.model_dump()):
        evaluate_and_save(str(folder), wanted.tasks, wanted.limit, precision)
    for name in wanted.baselines if wanted.tasks else ():
        path = baseline_file(folder.parent, name)
        if not path.is_file():
            evaluate(name, wanted.tasks, limit=wanted.limit, precision=precision).save(path)
    refresh_cards(folder.parent)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(run_to_status(lambda: release_milestone(Path(sys.argv[1]), int(sys.argv[2]))))
