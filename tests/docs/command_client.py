"""A program that the shell of a page calls: forwards its arguments, folder, variables and standard files to the server.

command_server.py installs it under many names. It imports little because it starts for each command.
"""

import json
import os
import socket
import sys

NAME, HERE = os.path.basename(sys.argv[0]), os.getcwd()  # noqa: PTH109, PTH119

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["DOCS_SOCKET"])
    request = {"words": [NAME, *sys.argv[1:]], "folder": HERE, "variables": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    status = connection.recv(16)
sys.exit(int(status or b"70"))
