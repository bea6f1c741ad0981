"""Program and sidecar that imports tinyllama and torch, in this order unless the argument is `torch-first`."""

import os
import sys


def main(order: str = "") -> int:
    """Import both packages, and print the policy that child processes would get."""
    if order == "torch-first":
        import torch  # noqa: F401
    import tinyllama

    tinyllama.Llama  # noqa: B018 - imports torch
    print(os.environ.get("OMP_WAIT_POLICY"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
