"""List a source's files as a user without rights: `python list_unprivileged.py PATH` prints them or the error."""

import os
import sys

from tinyllama.errors import InputError
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Source

if os.geteuid() == 0:  # root ignores permission bits
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    print(list_files("notes", Source(format="jsonl", path=sys.argv[1], weight=1)))
except InputError as error:
    print(error)
