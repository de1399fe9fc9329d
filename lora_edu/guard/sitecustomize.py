"""Loaded by every Python that a guarded kernel starts: no connection leaves the machine, no write hits the clone.

Only Python's own library. An audit hook sees every attempt, whichever library makes it.
"""

import os
import sys

REPOSITORY = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGES = {  # event: which of its arguments it changes
    "os.mkdir": [0],
    "os.remove": [0],
    "os.rmdir": [0],
    "os.rename": [0, 1],
    "os.link": [1],
    "os.symlink": [1],
}


def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        refuse_remote(arguments[1][0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        refuse_remote(arguments[0])
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        refuse_inside(arguments[0])
    elif event in CHANGES:
        for position in CHANGES[event]:
            refuse_inside(arguments[position])


def refuse_remote(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host and not host.startswith(LOOPBACK):
        raise ConnectionRefusedError(f"this kernel has no network; asked for {host}")


def refuse_inside(path):
    if isinstance(path, int):  # an open file by its number: it was seen when it was opened
        return
    path = os.path.realpath(os.fsdecode(path))
    if path.startswith(REPOSITORY + os.sep) and "__pycache__" not in path:
        raise PermissionError(
            f"a notebook writes only into the reader's folder; this is in the repository: {path}"
        )


sys.addaudithook(watch)
