"""Program and sidecar that imports tinyllama and torch, in this order unless the argument is `torch-first`.

With the argument `busy` it computes for two minutes instead.
"""

import os
import sys
import time


def main(action: str = "") -> int:
    """Import both packages, and print the policy that child processes would get."""
    if action == "busy":
        end = time.monotonic() + 120
        while time.monotonic() < end:
            pass
        return 0
    if action == "torch-first":
        import torch  # noqa: F401
    import tinyllama

    tinyllama.Llama  # noqa: B018 - imports torch
    print(os.environ.get("OMP_WAIT_POLICY"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
