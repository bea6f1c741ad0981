"""Program that runs `python -m tinyllama evaluate` and kills rank 1 before it scores."""

import os
import signal
import sys
from typing import Any

from tinyllama.cli import main
from tinyllama.evaluate import evaluation

evaluate = evaluation.evaluate


def evaluate_or_die(*arguments: Any, **options: Any) -> Any:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*arguments, **options)


evaluation.evaluate = evaluate_or_die
sys.exit(main())
