"""Program that runs a sidecar process of the process that forked this one: `sidecar_program.py MODULE ARGUMENTS`."""

import os
import sys

from tinyllama.processes import main

sys.exit(main(str(os.getppid()), *sys.argv[1:]))
