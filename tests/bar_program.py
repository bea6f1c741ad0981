"""Shows a progress bar of 200 quick steps, with a warning, a log message and a result in between."""

import logging
import sys

from tinyllama.progress import Bar

logging.basicConfig(stream=sys.stderr)
label = "training a-name-of-forty-characters-to-make-it-long"
where = "`tinyllama watch runs/long` shows it"
with Bar(label, 300, "steps", 100, rate="tokens", where=where) as bar:
    for step in range(101, 301):
        if step == 150:
            print("the tracker failed", file=sys.stderr)
            logging.warning("a library")
        if step == 200:
            print("a result")
        bar.show(step, "loss 3.142")
print("run: runs/long")
