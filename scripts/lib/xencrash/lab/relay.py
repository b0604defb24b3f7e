"""Passes connections to unix sockets on to TCP ports of this machine, as long as a process runs:

    relay.py PID SOCKET=PORT…

A program by itself: it outlives the command that starts it, as the machine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys

_CHUNK = 1 << 16


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(_CHUNK):
            target.write(data)
            await target.drain()


async def relay(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, until either side closes it."""
    with contextlib.closing(writer), contextlib.suppress(OSError):
        there, back = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(back):
            pumps = {asyncio.create_task(_pump(reader, back)), asyncio.create_task(_pump(there, writer))}
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()


async def serve(pid: int, ports: dict[str, int]) -> None:
    """Returns when the process ends."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(os.pidfd_open(pid), ended.set)
    for path, port in ports.items():
        await asyncio.start_unix_server(functools.partial(relay, port), path)
    await ended.wait()


def main(words: list[str]) -> None:
    pid, *pairs = words
    ports = {path: int(port) for path, _, port in (pair.rpartition("=") for pair in pairs)}
    with contextlib.suppress(ProcessLookupError):
        asyncio.run(serve(int(pid), ports))


if __name__ == "__main__":
    main(sys.argv[1:])
