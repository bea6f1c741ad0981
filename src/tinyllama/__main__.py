"""`python -m tinyllama` is the same as `tinyllama`."""

import sys

from tinyllama.cli import main

sys.exit(main())
