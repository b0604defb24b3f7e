"""The reference guest as a machine: what its crash image finds, which CPU crashes, and CPUs that are many or absent."""

from __future__ import annotations

from typing import Any

import pytest

from tests.live.machines import gdb, guest, named, rows, target
from xencrash.guests import command_line, feature, generations
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]


def what_the_crash_image_says(generation: str, append: str, **machine: Any) -> tuple[bytes, bytes, bytes]:
    """The CPU that crashes, the mode in which the crash image finds its local APIC, and NMIs: unblocked or blocked."""
    with guest(generation, append=append, **machine) as lab:
        lab.serial.wait(rb"crash image: NMIs are (unblocked|blocked)", 30)
        said = lab.serial_log.read_bytes()
    crasher = said.partition(b"CPUs ready, CPU ")[2][:1]
    mode = said.partition(b"alive, local APIC in ")[2].split()[0]
    return crasher, mode, said.rpartition(b"NMIs are ")[2].split()[0]


@pytest.mark.parametrize("generation", generations())
def test_a_crash_from_an_nmi_handler_by_itself_unblocks_nmis_since_the_patch(generation: str) -> None:
    says = what_the_crash_image_says(generation, command_line(by_itself=True, in_nmi=True, crash_cpu=2))
    assert says == (b"2", b"xAPIC", b"unblocked" if feature(generation, "HARDENED") else b"blocked")


def test_the_crash_image_finds_nmis_blocked_where_they_were_left_so() -> None:
    says = what_the_crash_image_says("4.17.0", command_line("nmis-latched", by_itself=True))
    assert says == (b"0", b"xAPIC", b"blocked")


@pytest.mark.parametrize(("append", "mode"), [("x2apic", b"xAPIC"), ("x2apic=firmware", b"x2APIC")])
def test_the_crash_image_finds_the_mode_in_which_the_firmware_booted(append: str, mode: bytes) -> None:
    says = what_the_crash_image_says("4.21.2", f"crash=auto {append}", qemu="10.0", lapic="x2apic")
    assert says == (b"0", mode, b"unblocked")


@pytest.mark.parametrize(
    ("generation", "append", "machine"),
    [
        ("4.21.2", "", {"cpus": 32}),
        ("4.3.0", "", {"cpus": 4, "max_cpus": 8}),  # an absent CPU's addresses are small numbers
        ("4.17.0", "", {"cpus": 4, "max_cpus": 8}),  # and not canonical here
        ("4.21.2", "", {"cpus": 2, "max_cpus": 16}),
        ("4.21.0", "crash_cpu=2", {}),
        ("4.17.0", "context=nmi crash_cpu=1", {}),
        ("4.17.0", "x2apic=firmware", {"qemu": "10.0", "lapic": "x2apic"}),
        ("4.21.2", "x2apic=firmware crash_cpu=3", {"qemu": "10.0", "lapic": "x2apic"}),
    ],
    ids=str,
)
def test_a_clean_crash_passes(generation: str, append: str, machine: Json) -> None:
    with guest(generation, append=append, **machine) as lab:
        report = trace(target(lab), str(lab.symbols), str(lab.qmp_socket), timeout=60,
                       trigger=lambda: lab.serial.send(b"C"))  # fmt: skip
    assert (named(report["findings"]), named(report["findings"], "unknown")) == ([], [])
    assert (report["verdict"], report["stages"][-1]["stage"]) == ("pass", "after-handover")
    assert report["crashing_cpu"] == int((append.partition("crash_cpu=")[2] or "0")[0])
    assert [cpu["cpu"] for cpu in report["cpus"]] == list(range(machine.get("cpus", 4)))
    modes = {cpu["lapic"]["mode"] for cpu in report["cpus"]}
    assert modes == {"x2apic" if "firmware" in append else "xapic"}


def test_without_qmp_each_cpu_is_asked_for_by_itself() -> None:
    """All at once is more than gdb and QEMU's stub can pass through a unix socket: both would wait for ever."""
    with guest(cpus=16) as lab:
        said = gdb(lab, "monitor cpu 3", "xen cpus", "monitor info cpus", qmp=False)
        assert [row[0] for row in rows(said, "CPUs")] == [str(cpu) for cpu in range(16)]
        assert [line[:8] for line in said.splitlines() if line.startswith("*")] == ["* CPU #3"]
    with guest(cpus=32) as lab:
        said = gdb(lab, "xen cpus", qmp=False)
        assert "has 32 CPUs, and the monitor's output for that many overruns a unix socket: set xen qmp-socket" in said
        assert len(rows(gdb(lab, "xen cpus"), "CPUs")) == 32
