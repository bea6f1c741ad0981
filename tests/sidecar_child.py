"""A sidecar's module, and the program of a parent that starts one."""

import os
import sys
import time


def main(action: str, *arguments: str) -> int:
    """Print environment variables and the priority; or fail when the input ends; or start a sidecar, print its ID."""
    if action == "environment":
        for name in arguments:
            print(repr(os.environ.get(name)))
        print(os.getpriority(os.PRIO_PROCESS, 0))
        return 0
    if action == "parent":
        from tinyllama.processes import start_sidecar

        child = start_sidecar("tests.sidecar_child", "sleep", one_core=True)
        assert child.stdout is not None
        print(child.stdout.readline().strip(), flush=True)
        time.sleep(1000)
    if action == "sleep":
        print(os.getpid(), flush=True)
        time.sleep(1000)
    sys.stdin.read()
    print(*arguments, file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
