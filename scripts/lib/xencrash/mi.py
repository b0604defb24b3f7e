"""What gdb says over its machine interface: the records that come out of its pipe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
from collections.abc import Iterator
from typing import IO, Any

from pygdbmi import gdbmiparser

Record = dict[str, Any]

_PIPE = 1 << 16  # bytes, which a pipe holds
# The result of a command of the plugin: up to a megabyte, whose escapes pygdbmi decodes one by one. It is JSON in a C
# string; where that has the escapes of JSON only, it is JSON as well.
_ANSWER = re.compile(r'(\d+)\^done,json=(".*")')


class Records:
    """A reader of gdb's standard output."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe.fileno()
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)
        self._begun: list[bytes] = []  # of a line that has not ended

    def read(self, timeout: float) -> list[Record]:
        """Those that are there, or are the first to come within `timeout` seconds; none also when gdb ended."""
        if not self._poll.poll(timeout * 1000):
            return []
        return list(map(parsed, self._lines(os.read(self._pipe, _PIPE))))

    def _lines(self, data: bytes) -> Iterator[str]:
        *ended, begun = data.split(b"\n")
        for end in ended:
            line = b"".join([*self._begun, end]).decode(errors="replace").rstrip("\r")
            self._begun.clear()
            if line and not gdbmiparser.response_is_finished(line):
                yield line
        self._begun.append(begun)


def parsed(line: str) -> Record:
    """A record, as pygdbmi has it."""
    if answer := _ANSWER.fullmatch(line):
        with contextlib.suppress(ValueError):
            payload = {"json": json.loads(answer[2])}
            return {"type": "result", "message": "done", "payload": payload, "token": int(answer[1])}
    return gdbmiparser.parse_response(line)
