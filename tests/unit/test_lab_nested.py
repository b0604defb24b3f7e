"""A machine under KVM in a machine under TCG: what is put where, without either."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from xencrash.lab import boot, images, nested, relay
from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.packages import Cache
from xencrash.lab.qemu import Boot, Paths, Ram
from xencrash.lab.rows import ACCELS
from xencrash.lab.runs import State
from xencrash.lab.specification import Specification

# Of QEMU 10.0, by its monitor.
USERNET = (
    "Hub -1 (net):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "  TCP[HOST_FORWARD]  20       127.0.0.1 36787       10.0.2.15  5001     0     0\r\n"
    "  TCP[HOST_FORWARD]  19       127.0.0.1 44259       10.0.2.15  5002     0     0\r\n"
    "  TCP[HOST_FORWARD]  18       127.0.0.1 45885       10.0.2.15  5003     0     0\r\n"
    "  TCP[ESTABLISHED]   21       127.0.0.1 45885       10.0.2.15  5003     0     0\r\n"
)


def test_the_ports_of_the_gdbstub_and_the_monitors() -> None:
    assert nested._forwarded(USERNET) == {"gdb": 36787, "qmp": 44259, "own_qmp": 45885}


@pytest.mark.parametrize(("accel", "irqchip"), [("kvm-in-tcg", "on"), ("kvm-split-in-tcg", "split")])
def test_the_inner_qemu_is_connected_through_the_outer_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accel: str, irqchip: str
) -> None:
    monkeypatch.setattr(images, "qemu_words", lambda cache, row: ("qemu",))
    kernel = Boot(Path("/k"), Path("/s"), initrd="/m/linux console=hvc0 quiet,/m/dom0.gz")
    paths = Paths(tmp_path)
    recipe = boot.recipe_of(Specification(kernel=kernel, accel=accel, memory=64), Cache(tmp_path))
    words = recipe.command(paths, Ram(None))
    options = dict(itertools.pairwise(words))
    assert options["-kernel"] == f"{tmp_path}/outer/boot/kernel"
    assert options["-initrd"] == f"{tmp_path}/outer/boot/module-0 console=hvc0 quiet,{tmp_path}/outer/boot/module-1"
    assert (options["-accel"], options["-cpu"]) == ("kvm", "host,-smap")
    assert options["-machine"] == f"q35,memory-backend=ram,kernel_irqchip={irqchip}"
    assert options["-object"] == "memory-backend-ram,id=ram,size=64M"
    assert [there for option, there in itertools.pairwise(words) if option in ("-gdb", "-qmp")] == [
        f"tcp:0.0.0.0:{port},server=on,wait=off" for port in (5001, 5002, 5003)
    ]
    assert [there for option, there in itertools.pairwise(words) if option == "-chardev"] == [
        "serial,path=/dev/hvc0,id=console", "serial,path=/dev/hvc1,id=line"
    ]  # fmt: skip
    assert options["-drive"].startswith("file=/dev/vda,cache=none,")
    assert not recipe.specification.keeps_snapshot


def test_what_it_boots_is_where_the_inner_qemu_looks(tmp_path: Path) -> None:
    run = Paths(tmp_path / "run")
    run.outer.mkdir(parents=True)
    for name in ("linux", "dom0.gz"):
        (tmp_path / name).write_text(f"the {name}")
    whole = Boot(tmp_path / "xen", tmp_path / "syms", initrd=f"{tmp_path}/linux quiet,{tmp_path}/dom0.gz")
    for _ in range(2):  # again in the same folder
        nested.place(whole, b"the kernel", run)
    there = nested.moved(whole, run)
    assert there.kernel.read_bytes() == b"the kernel"
    assert [Path(module.split(" ")[0]).read_text() for module in there.modules] == ["the linux", "the dom0.gz"]
    assert [module.split(" ")[1:] for module in there.modules] == [["quiet"], []]
    (run.outer / "disk.raw").write_bytes(b"a vmcore")
    assert run.disk.read_bytes() == b"a vmcore"


def test_the_outer_machine_waits_for_its_shell_and_is_kept_as_a_snapshot() -> None:
    linux = Specification(kernel=Boot(Path("/k"), Path("/s")), wait="shell")
    assert (linux.boots_shell, linux.keeps_snapshot, linux.boots_dom0) == (True, True, False)
    assert not Specification(kernel=linux.kernel).keeps_snapshot
    assert {name for name, row in ACCELS.items() if row.nested} == {"kvm-in-tcg", "kvm-split-in-tcg"}


def test_its_ram_is_not_a_file_here(tmp_path: Path) -> None:
    state = State(os.getpid(), 1, "/syms", 64, 1, 1, "4.17.0", "7.2", True, "kvm-in-tcg")
    with pytest.raises(LabError, match="the RAM of this machine is in another's, as --accel kvm-in-tcg has it"):
        _ = Machine(Paths(tmp_path), state, False, lambda text: None).ram_file


@pytest.fixture
def echo() -> Iterator[int]:
    """A TCP port that greets each client, and answers in capitals until the client is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.sendall(b"hello")
                    while data := client.recv(100):
                        client.sendall(data.upper())

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def test_a_relay_passes_each_connection_on_until_the_machine_ends(tmp_path: Path, echo: int) -> None:
    path = tmp_path / "qmp.sock"
    with subprocess.Popen(["sleep", "600"]) as machine:
        words = [sys.executable, "-I", relay.__file__, str(machine.pid), f"{path}={echo}"]
        with subprocess.Popen(words) as process:
            while not path.exists():
                assert process.poll() is None
            for _ in range(2):  # the port serves one client at a time: the second is greeted when the first is gone
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(60)
                    client.connect(str(path))
                    assert client.recv(5, socket.MSG_WAITALL) == b"hello"
                    client.sendall(b"qmp")
                    assert client.recv(3, socket.MSG_WAITALL) == b"QMP"
            machine.kill()
            assert process.wait(60) == 0


def test_a_relay_of_a_machine_that_is_gone_ends(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as machine:
        machine.wait()
    assert subprocess.run([sys.executable, "-I", relay.__file__, str(machine.pid)], timeout=60).returncode == 0
