"""Program that prints the timeouts of a mesh's groups in seconds: `mesh_timeouts_program.py WATCHDOG_SECONDS`."""

import os
import socket
import sys

import torch

from tinyllama.distributed import build_mesh, init_distributed
from tinyllama.recipe import Parallel

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
child = os.fork()  # which saves the imports
os.environ["RANK"] = "0" if child else "1"
with init_distributed(float(sys.argv[1])) as world:
    groups = build_mesh(Parallel(replicate=2), world).get_all_groups()
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
if not child:
    os._exit(0)
print(*timeouts)
os.waitpid(child, 0)
