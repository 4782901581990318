"""The command from a process that has everything loaded, where another program starts it: python -IS quick_command.py NAME WORDS

It takes 20 ms of CPU time, where an interpreter that loads all of it takes 600. tests/command_line.py serves it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence


def ask(
    name: str, words: Sequence[str], cwd: str, environment: Mapping[str, str], streams: Sequence[int]
) -> socket.socket:
    """Ask the server of this name for a command with these streams (in, out, err). It answers with the number of the
    process, and with the exit code, a line each."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(f"\0{name}")
    asked = json.dumps([list(words), cwd, dict(environment)]).encode()
    socket.send_fds(line, [len(asked).to_bytes(8, "big")], streams)
    line.sendall(asked)
    return line


if __name__ == "__main__":
    with ask(sys.argv[1], sys.argv[2:], os.getcwd(), os.environ, (0, 1, 2)).makefile("rb") as answers:
        _, code = int(answers.readline()), int(answers.readline())
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)
