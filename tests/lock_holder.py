"""Holds the lock FOLDER/LOCK until standard input ends: `python lock_holder.py FOLDER LOCK`."""

import sys
from pathlib import Path

from tinyllama.files import exclusive_lock

with exclusive_lock(Path(sys.argv[1], sys.argv[2]), ""):
    print("held", flush=True)
    sys.stdin.read()
