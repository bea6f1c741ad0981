"""Program that runs `python -m tinyllama` with workers that may use only 100 MiB more than they start with.

The test runs this program in a new process. Earlier tests may have freed several 100 MiB in the process of the test,
which the workers could use.
"""

import os
import resource
import sys
from pathlib import Path

from tinyllama import cli


def limit_memory() -> None:
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (100 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


os.register_at_fork(after_in_child=limit_memory)
sys.exit(cli.main())
