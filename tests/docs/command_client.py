"""A program that the shell of a page calls: requests a run of run_command.py from the fork server.

shell.py installs this program under many names. It imports little because it starts for each command.
"""

import json
import os
import socket
import sys

WORDS = [os.path.basename(sys.argv[0]), *sys.argv[1:]]  # noqa: PTH119

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("\0" + os.environ["DOCS_SERVER"])
    request = [os.environ["DOCS_PROGRAM"], WORDS, dict(os.environ), os.getcwd()]  # noqa: PTH109
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    *_, status = connection.makefile()
sys.exit(int(status))
