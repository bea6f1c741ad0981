"""A tracker's process for which trackio's folder is on a network disk."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRACKIO_DIR"] = str(Path(sys.argv[1]).resolve().parent / ".trackio")
    from trackio import utils

    utils.is_network_filesystem = lambda path: True
    from tinyllama.tracking.trackers import main

    sys.exit(main(*sys.argv[1:]))
