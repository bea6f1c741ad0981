"""Runs a script in several folders, in one process: SCRIPT FOLDER…"""

import os
import runpy
import sys

for folder in sys.argv[2:]:
    os.chdir(folder)
    runpy.run_path(sys.argv[1], run_name="__main__")
