"""Runs a command that must not outlive its parent: `python tether.py PARENT COMMAND…`.

The kernel sends the command SIGTERM when the parent dies, however it dies. A script of its own, because the setting
belongs to the process that will become the command, and code between fork and exec is not safe in Python.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to `arguments[0]`, its parent's process id, and become the command in the rest."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(arguments[0]):
        sys.exit(1)  # the parent died before the kernel knew
    os.execvp(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
