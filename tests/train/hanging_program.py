"""Program that calls its heartbeat for a while and then hangs: `hanging_program.py BEATS LIMIT`.

It hangs in a lock of the C library, as a rank does in a collective: no signal handler of Python can run. It prints
`noted` when Ctrl-C arrives.
"""

import ctypes
import signal
import sys
import time

from tinyllama.processes import record_signals
from tinyllama.train.guard import watchdog

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
with (
    record_signals(lambda: print("noted", flush=True)) as signals,
    watchdog(float(sys.argv[2]), lambda seconds: print(f"hang {seconds:g}", flush=True), signals) as heartbeat,
):
    for _ in range(int(sys.argv[1])):
        time.sleep(0.05)
        heartbeat()
    signals.can_save = True
    print("ready", flush=True)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
print("over")
