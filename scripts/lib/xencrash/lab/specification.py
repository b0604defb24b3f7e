"""The specification of a machine of the lab, and every rule on what goes together.

A rule's message names the option of the command line, which a field's name is: `domu_vcpus` is --domu-vcpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xencrash.guests import BY_ID, Fault, generations
from xencrash.lab.crash import Crash
from xencrash.lab.errors import BadSpecification
from xencrash.lab.own import OwnXen
from xencrash.lab.qemu import Boot
from xencrash.lab.rows import (
    ACCELS,
    DEFAULT_ACCEL,
    DEFAULT_QEMU,
    DEFAULT_XEN,
    LAPICS,
    QEMUS,
    XENS,
    AccelRow,
    LapicRow,
    QemuRow,
    XenRow,
)

WAITS = ("dom0", "xen", "shell", "none")
BOOTS = ("multiboot", "efi")
_GUEST_MIB, _XEN_MIB = 64, 704
CPUINFO = Path("/proc/cpuinfo")
# Options for real Xen only; the reference guest has no use for them.
_OF_XEN = ("xen", "xen_image", "memory", "dom0_vcpus", "domu_vcpus", "xen_args", "dom0_args", "how", "no_crash_kernel")


@dataclass(frozen=True)
class Specification:
    """A machine to make. Raises BadSpecification for what is impossible, or would have no effect.

    What it boots is one of: `xen`, a row of the lab, with dom0 and a crash kernel (the default); `xen_image`, a Xen
    that no row has, in its place; `guest`, a generation of the reference guest, which may have a `fault`; `kernel`,
    anything else that QEMU boots. `boot` is how Xen is booted, one of BOOTS.

    `qemu` and `accel` are rows. `lapic` is a row of LAPICS or None (what this QEMU does). `memory` is in MiB.
    `domu_vcpus` is the number of CPUs on which a domU spins once dom0 is up. With `pvh` dom0 is a PVH guest, its vCPUs
    in SVM guest mode, and no crash kernel is loaded: kexec finds no place for one there. It gets no RDTSCP, on whose
    intercept Xen kills it under TCG. `cpu_args` is added to QEMU's -cpu, `qemu_args` to its command line. `wait` is how
    far the boot is waited for: "dom0" (a shell answers, the crash kernel is loaded unless `crash_kernel` is false, and
    the domU runs), "xen" (all CPUs are up) or "none", of `xen`; "shell", of a `kernel`, whose shell answers as dom0's.
    `paused` stops before the first instruction, and waits for nothing. `crash` is how it will be crashed: the reference
    guest is given its CPU when it boots.
    """

    xen: str | None = None
    xen_image: OwnXen | None = None
    guest: str | None = None
    fault: str | None = None
    kernel: Boot | None = None
    boot: str = BOOTS[0]
    qemu: str = DEFAULT_QEMU
    accel: str = DEFAULT_ACCEL
    lapic: str | None = None
    cpus: int = 4
    max_cpus: int | None = None
    memory: int | None = None
    crash_kernel: bool = True
    xen_args: str = ""
    dom0_args: str = ""
    dom0_vcpus: int | None = None
    domu_vcpus: int = 0
    pvh: bool = False
    cpu_args: str = ""
    qemu_args: tuple[str, ...] = ()
    wait: str = "dom0"
    paused: bool = False
    crash: Crash = field(default_factory=Crash)

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise BadSpecification(problem)

    # Derived properties.

    @property
    def name(self) -> str:
        xen = self.xen_image.name if self.xen_image else f"Xen {self.xen_row.name}"
        return self.kernel.kernel.name if self.kernel else self.guest or xen

    @property
    def boots_xen(self) -> bool:
        return not (self.guest or self.kernel)

    @property
    def boots_efi(self) -> bool:
        return self.boot == "efi"

    @property
    def boots_dom0(self) -> bool:
        """Whether dom0 is waited for, and answers."""
        return self.boots_xen and self.wait == "dom0" and not self.paused

    @property
    def boots_guest(self) -> bool:
        """Whether the reference guest is waited for."""
        return self.guest is not None and self.wait != "none" and not self.paused

    @property
    def boots_shell(self) -> bool:
        """Whether a kernel's shell is waited for, and answers."""
        return self.kernel is not None and self.wait == "shell" and not self.paused

    @property
    def loads_crash_kernel(self) -> bool:
        return self.crash_kernel and not self.pvh

    @property
    def xen_row(self) -> XenRow:
        return XENS[self.xen or DEFAULT_XEN]

    @property
    def generation(self) -> str | None:
        """The one that must be identified, where it is known."""
        return self.guest or (None if self.xen_image else self.xen_row.generation)

    @property
    def qemu_row(self) -> QemuRow:
        return QEMUS[self.qemu]

    @property
    def accel_row(self) -> AccelRow:
        return ACCELS[self.accel]

    @property
    def lapic_row(self) -> LapicRow:
        return LAPICS[self.lapic or ("x2apic" if self.accel_row.cpu else self.qemu_row.default_lapic)]

    @property
    def cpu_modes(self) -> Mapping[str, str]:
        """`-cpu` by LAPIC mode."""
        return self.accel_row.cpu or self.qemu_row.cpu

    @property
    def crash_cpu_args(self) -> str:
        """What `-cpu` needs for the crash, if it is TCG's."""
        return "" if ACCELS[self.accel].cpu else self.crash.way.cpu_args

    @property
    def keeps_snapshot(self) -> bool:
        """Whether it starts from a snapshot of an earlier boot. Not under KVM, whose CPU is the host's."""
        return (self.boots_dom0 or self.boots_shell) and self.accel == DEFAULT_ACCEL

    @property
    def memory_mib(self) -> int:
        return self.memory or (_XEN_MIB if self.boots_xen else _GUEST_MIB)

    # The rules.

    def _problems(self) -> Iterator[str]:
        yield from self._unknown_names()
        if self.accel == "kvm" and not has_virtualisation(CPUINFO.read_text()):
            yield "--accel kvm needs a processor with SVM or VMX, and /proc/cpuinfo names neither: leave it out"
        self.crash.require_cpu(self.cpus)
        if self.max_cpus is not None and self.max_cpus < self.cpus:
            yield f"--max-cpus {self.max_cpus}: the machine has {self.cpus} CPUs: give as many or more"
        if self.fault and not self.guest:
            yield "--fault is for the reference guest: give --guest too"
        if self.guest:
            yield from self._problems_of_guest(self.guest)
        if self.boots_efi and not self.boots_xen:
            yield "--boot efi is for real Xen: leave it out"
        if self.boots_efi and self.accel_row.nested:
            yield f"--accel {self.accel} has no OVMF, which --boot efi needs: leave one out"
        if self.boots_efi and self.lapic_row.firmware:
            yield f"--lapic {self.lapic} changes the multiboot image, which --boot efi does not boot: leave one out"
        if self.lapic == "x2apic" or self.lapic_row.firmware:
            yield from self._without_x2apic(f"--lapic {self.lapic}")
        if self.boots_xen:
            yield from self._problems_of_xen()

    def _unknown_names(self) -> Iterator[str]:
        for option, name, known in (
            ("xen", self.xen, XENS),
            ("qemu", self.qemu, QEMUS),
            ("accel", self.accel, ACCELS),
            ("lapic", self.lapic, LAPICS),
            ("wait", self.wait, WAITS),
            ("boot", self.boot, BOOTS),
        ):
            if name is not None and name not in known:
                yield f"--{option} is one of {', '.join(known)}, not {name!r}"

    def _problems_of_xen(self) -> Iterator[str]:
        if self.xen and self.xen_image:
            yield "--xen and --xen-image are two Xens: leave one out"
        if self.xen_image and self.domu_vcpus:
            yield "--domu-vcpus needs the libraries of this Xen, which --xen-image comes without: leave it out"
        if self.domu_vcpus > self.cpus:
            yield f"--domu-vcpus {self.domu_vcpus}: each needs its own CPU, and the machine has {self.cpus}"
        if self.domu_vcpus and self.paused:
            yield "--domu-vcpus is for a machine that boots, and --paused stops it: leave one out"
        if self.domu_vcpus and self.wait != "dom0":
            yield f"--domu-vcpus needs dom0, which wait={self.wait!r} does not wait for: leave one out"
        self.crash.require_vcpus(self.cpus, self.dom0_vcpus or 1)

    def _problems_of_guest(self, guest: str) -> Iterator[str]:
        given: dict[str, Any] = vars(self) | {"how": self.crash.how, "no_crash_kernel": not self.crash_kernel}
        for option in _OF_XEN:
            if given[option]:
                words = "--" + option.replace("_", "-")
                yield f"{words} is for real Xen, and --guest boots the reference guest: leave it out"
        if self.kernel:
            yield "kernel and guest are two things to boot: leave one out"
        if guest not in generations():
            yield f"--guest {guest}: the generations are {', '.join(generations())}"
        if self.fault and self.fault not in BY_ID:
            yield f"--fault {self.fault}: xencrash lab guests lists the faults"
        if self.fault:
            yield from self._hidden(BY_ID[self.fault], guest)
        if self.lapic_row.firmware:
            yield f"--lapic {self.lapic} is for Xen: for the reference guest it is --fault firmware-x2apic"

    def _hidden(self, fault: Fault, guest: str) -> Iterator[str]:
        """Why a machine would not show the fault."""
        if guest not in fault.generations:
            yield f"--fault {fault.id} applies to {', '.join(fault.generations)}, not to {guest}"
        if self.cpus < fault.cpus:
            yield f"--fault {fault.id} cannot be seen with {self.cpus} CPU: give --cpus {fault.cpus} or more"
        if fault.x2apic and self.lapic == "xapic":
            yield f"--fault {fault.id} needs x2APIC mode: give --lapic x2apic, or leave --lapic out"
        if fault.x2apic:
            yield from self._without_x2apic(f"--fault {fault.id}")

    def _without_x2apic(self, what: str) -> Iterator[str]:
        able = [row.name for row in QEMUS.values() if "x2apic" in row.cpu]
        if "x2apic" not in self.cpu_modes:
            yield f"{what} needs x2APIC, which QEMU {self.qemu} does not emulate: give --qemu {' or '.join(able)}"


def has_virtualisation(cpuinfo: str) -> bool:
    """Whether the flags in /proc/cpuinfo have AMD's SVM or Intel's VMX, without which KVM runs nothing."""
    return bool(re.search(r"^flags\s*:.*\b(?:svm|vmx)\b", cpuinfo, re.MULTILINE))
