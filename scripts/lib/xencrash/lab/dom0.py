"""Commands in dom0, over the lab's serial line (initramfs.DOM0_INIT answers there)."""

from __future__ import annotations

import base64
import re
import secrets
import textwrap
import time
from collections.abc import Callable

from xencrash.lab.errors import LabError
from xencrash.lab.initramfs import LINE
from xencrash.lab.process import Process
from xencrash.lab.serial import Line

READY = rb"^@shell ready\r?\n"
LOADED = rb"^@crash-kernel-loaded 0\r?$"
BUSY_ANSWERS = 600.0  # seconds for an answer from a dom0 that shares each CPU with loops and a domU, on a busy host
_TYPED_AGAIN_AFTER = 20.0  # seconds without a sign of a command's beginning
_LOADS_IN = 300.0  # seconds for kexec to load the crash kernel, on a busy host
# --no-checks: kexec's SHA-256 of it before it starts would be a quarter of a vmcore's time under TCG.
# no_timer_check: on a busy host too few of TCG's timer interrupts come in time for Linux, which would panic.
KEXEC = (
    "kexec -p /boot/vmlinux --args-linux --no-checks --initrd=/boot/crash.cpio.gz "
    '--append="console=ttyS0 irqpoll no_timer_check nr_cpus=1 reset_devices loglevel=5"'
)


def _short(command: str) -> str:
    """A command for a message of one line."""
    return repr(textwrap.shorten(command, 80, placeholder=" …"))


class Dom0:
    """The shell in dom0."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._line = Line(process.paths.line)
        self._loops: set[int] = set()  # process IDs
        self.clock_is_late = False  # since the machine was saved: the next command sets it first

    def run(self, command: str, timeout: float = 30.0) -> str:
        """What a shell command printed (both streams); LabError if its exit status is not 0."""
        status, output = self.status(command, timeout)
        if status:
            raise LabError(f"in dom0, {_short(command)} failed with status {status}: {' '.join(output.split())[-200:]}")
        return output

    def status(self, command: str, timeout: float = 30.0) -> tuple[int, str]:
        """The exit status of a shell command, and what it printed."""
        log = self._process.paths.line_log
        since = self._process.log_size(log)
        token = self.begin(command)
        answer = rb"(?s)\A(.*?)\r?\n@" + token.encode() + rb" (\d+)\r?\n"
        match = self._process.wait_log(log, answer, timeout, f"running {_short(command)} in dom0", since)
        return int(match[2]), match[1].decode(errors="replace").replace("\r\n", "\n")

    def begin(self, command: str) -> str:
        """Start a shell command, and return the token that is printed, with its exit status, when it has ended."""
        token, request = self._request(command)
        self._line.send(request)
        return token

    def begin_last(self, command: str, gone: Callable[[], bool]) -> None:
        """Start a shell command that dom0 does not survive; return when it has begun, or dom0 is `gone`.

        The line can lose a byte, and nobody would wait for the command's end: dom0 says that it begins, and is asked
        again until it does. That is safe, as the first to arrive is the last. Raises LabError.
        """
        mark = f"@last {secrets.token_hex(4)}"
        log = self._process.paths.line_log
        since = self._process.log_size(log)
        # Setting the line's attributes waits until the mark is out (TCSADRAIN).
        _, request = self._request(f"echo {mark}; stty -F {LINE} raw -echo; {command}")
        typed_at: float | None = None

        def begun() -> bool | None:
            nonlocal typed_at
            if mark.encode() in self._process.read_log(log, since) or (typed_at is not None and gone()):
                return True
            if typed_at is None or time.monotonic() - typed_at > _TYPED_AGAIN_AFTER:
                self._line.send(b"\n" * (typed_at is not None) + request)  # what arrived of the last ends here
                typed_at = time.monotonic()
            return None

        self._process.until(f"running {_short(command)} in dom0", BUSY_ANSWERS, begun)

    def _request(self, command: str) -> tuple[str, bytes]:
        """A command's token, and the line that dom0 reads."""
        if not re.search(READY, self._process.read_log(self._process.paths.line_log), re.MULTILINE):
            raise LabError(f"in dom0: no shell answers {_short(command)}: {self._process.where_to_look()}")
        token = secrets.token_hex(4)
        if self.clock_is_late:
            command = f"date -s @{time.time():.0f} >/dev/null; {command}"
            self.clock_is_late = False
        return token, f"{token} {base64.b64encode(command.encode()).decode()}\n".encode()

    def load_crash_kernel(self) -> None:
        """Give Xen a crash kernel: without one its crash path returns at once."""
        status, output = self.status(f"{KEXEC}; status=$?; echo @crash-kernel-loaded $status; exit $status", _LOADS_IN)
        if status:
            said = output.strip().splitlines()[0]
            raise LabError(f"loading the crash kernel: kexec failed: {said}: {self._process.where_to_look()}")
        self._process.progress("crash kernel loaded")

    def load(self, loops: int) -> None:
        """Keep dom0 busy with this many more endless loops."""
        for _ in range(loops):
            self._loops.add(int(self.run("while :; do :; done >/dev/null 2>&1 & echo $!", BUSY_ANSWERS)))

    def require_busy(self) -> None:
        """Raise LabError unless Linux says that each loop runs."""
        if self._loops:
            stats = " ".join(f"/proc/{pid}/stat" for pid in sorted(self._loops))
            said = self.run(f"cat {stats} 2>&1; true", BUSY_ANSWERS)
            running = {int(line.split()[0]) for line in said.splitlines() if re.match(r"\d+ \(.*\) R ", line)}
            if running != self._loops:
                raise LabError(f"in dom0: {len(self._loops)} busy loops were started, and {len(running)} run: {said!r}")

    def close(self) -> None:
        self._line.close()
