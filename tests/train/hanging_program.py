"""Program that gives signs of life for a while and then hangs: `hanging_program.py BEATS SECONDS`."""

import sys
import time

from tinyllama.train.guard import watchdog

with watchdog(0.5, lambda: print("hang", flush=True)) as heartbeat:
    for _ in range(int(sys.argv[1])):
        time.sleep(0.05)
        heartbeat()
    time.sleep(float(sys.argv[2]))
print("over")
