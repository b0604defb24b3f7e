"""What the lab can run: one row for each suite of packages, Xen, QEMU and gdb, with the reason for it.

Another Xen is one more row here, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """Where packages come from: pairs of the label in the archive's Release file and the suite.

    Packages of a `moving` suite may change any day: its cells are not in the default selection.
    """

    name: str
    sources: tuple[tuple[str, str], ...]
    default_release: str | None = None  # for a suite that apt does not prefer by itself (backports)
    moving: bool = False


def _stable(codename: str) -> tuple[tuple[str, str], ...]:
    return (("Debian", codename), ("Debian-Security", f"{codename}-security"))


SUITES = {
    suite.name: suite
    for suite in (
        Suite("bullseye", _stable("bullseye")),
        Suite("bookworm", _stable("bookworm")),
        Suite("bookworm-backports", (*_stable("bookworm"), ("Debian", "bookworm-backports")), "bookworm-backports"),
        Suite("trixie", _stable("trixie")),
        Suite("sid", (("Debian", "sid"),), moving=True),
    )
}

KERNEL_SUITE = "bookworm"  # one dom0 and crash kernel for every row: only the hypervisor should differ
KERNEL_PACKAGE = "linux-image-amd64"  # its dependency names the kernel; the -cloud- flavour has no dom0 support
BUSYBOX_PACKAGE = "busybox-static"
LIBXEN_HEADERS = "libxen-dev"  # of a Xen's own suite: what creates a domU is built with them


@dataclass(frozen=True)
class XenRow:
    """One real Xen. Patterns are of paths inside the packages, without a leading slash.

    `generation` is the one that must be identified.

    kexec comes from `kexec_suite`. It talks to the hypervisor through libxenctrl, which fits its own Xen
    only (4.17's fails on 4.14: "Cannot load …"): `libxenctrl` is the package that has this Xen's,
    in `suite`, and `libxenctrl_as` the name under which kexec asks for it, if that is another Xen's.
    """

    name: str
    suite: str
    packages: tuple[str, ...]
    image: str
    symbols: str
    kexec_suite: str
    generation: str
    reason: str
    libxenctrl: str = ""
    libxenctrl_as: str = ""

    @property
    def version(self) -> str:
        """The beginning of its version, as printed on its console: 4.20 for the rows 4.20 and 4.20-sid."""
        return self.name.partition("-")[0]


XENS = {
    row.name: row
    for row in (
        XenRow(
            "4.17",
            "bookworm",
            ("xen-hypervisor-4.17-amd64", "xen-hypervisor-4.17-amd64-dbg"),
            "boot/xen-4.17-amd64.gz",
            "usr/lib/debug/boot/xen-syms-4.17-amd64",
            "bookworm",
            "4.17.0",
            "Debian 12's; its symbols are a symbol table without DWARF",
        ),
        XenRow(
            "4.14",
            "bullseye",
            ("xen-hypervisor-4.14-amd64",),
            "boot/xen-4.14-amd64.gz",
            "usr/lib/debug/xen-syms-4.14.*[0-9].gz",
            "bookworm",
            "4.3.4",
            "Debian 11's; its kexec was built without Xen, so Debian 12's is run with Debian 11's libxenctrl",
            libxenctrl="libxenmisc4.14",
            libxenctrl_as="libxenctrl.so.4.17",
        ),
        XenRow(
            "4.20",
            "trixie",
            ("xen-hypervisor-4.20-amd64", "xen-hypervisor-4.20-amd64-dbg"),
            "boot/xen-4.20-amd64.gz",
            "usr/lib/debug/boot/xen-syms-4.20-amd64",
            "trixie",
            "4.17.0",
            "Debian 13's; its symbols are full DWARF",
        ),
    )
}
DEFAULT_XEN = "4.17"


@dataclass(frozen=True)
class QemuRow:
    """One QEMU, from a suite. `cpu` gives `-cpu` by LAPIC mode; this QEMU has no other modes.

    Without SMAP: a PV dom0 dies at once in create_bounce_frame when TCG has it (seen with Xen 4.17).
    """

    name: str
    suite: str
    cpu: dict[str, str]
    default_lapic: str
    iommu: str  # `-device`: Xen builds a PVH dom0 only with one. Not amd-iommu: QEMU dies saving its device state
    reason: str
    # Whether runs of many crashes may have a domU. With 10.0's TCG Xen works, but processes of a busy dom0 die:
    # 6 of 60 of SIGSEGV, beside 4 busy loops. What that QEMU does wrong is not known.
    domu: bool = False


QEMUS = {
    row.name: row
    for row in (
        QemuRow(
            "7.2",
            "bookworm",
            {"xapic": "max,-smap"},
            "xapic",
            "intel-iommu,intremap=on",
            "Debian 12's; TCG has x2APIC only since QEMU 9.0 (commit b5ee0468e9d2)",
            domu=True,
        ),
        QemuRow(
            "10.0",
            "bookworm-backports",
            {"x2apic": "max,-smap", "xapic": "max,-smap,-x2apic"},
            "x2apic",
            "intel-iommu,intremap=on,eim=on",
            "backported to Debian 12 from 13; Xen turns x2APIC on by itself if the CPU has it",
        ),
        QemuRow(
            "sid",
            "sid",
            {"x2apic": "max,-smap", "xapic": "max,-smap,-x2apic"},
            "x2apic",
            "intel-iommu,intremap=on,eim=on",
            "the newest in Debian (11.1 in November 2026)",
        ),
    )
}
@dataclass(frozen=True)
class LapicRow:
    """How the local APICs are to be. `mode` is the one that Xen runs in; with `firmware` it is also the boot mode."""

    name: str
    mode: str
    reason: str
    firmware: bool = False


LAPICS = {
    row.name: row
    for row in (
        LapicRow("xapic", "xapic", "a CPU without x2APIC: Xen changes no mode"),
        LapicRow("x2apic", "x2apic", "as SeaBIOS leaves them: Xen turns x2APIC on, and off again when it stops"),
        LapicRow(
            "x2apic-firmware",
            "x2apic",
            "x2APIC is on when Xen is entered: it stops in that mode, and the self-NMI goes through the ICR as an MSR",
            firmware=True,
        ),
    )
}
# The parts of QEMU that the lab needs: the program and its libraries; TCG, where it is a module; the firmware.
QEMU_PACKAGE = "qemu-system-x86"
QEMU_DATA_PACKAGES = ("qemu-system-common", "qemu-system-data", "seabios")
QEMU_FILES = (
    "usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
    "usr/share/seabios/bios-256k.bin",
    "usr/share/qemu/*.bin",
)
DEFAULT_QEMU = "7.2"


@dataclass(frozen=True)
class AccelRow:
    """What runs a machine's CPUs. `cpu` gives `-cpu` by LAPIC mode; without it that is the QEMU's (QemuRow). `irqchip`
    is what of the interrupt controllers is in the kernel. A `nested` one is in a machine of the lab under TCG. What
    happens there may take `slower` times as long as under TCG."""

    name: str
    reason: str
    cpu: dict[str, str] | None = None
    irqchip: str | None = None
    nested: bool = False
    slower: float = 1.0

    @property
    def option(self) -> str:
        """QEMU's `-accel`."""
        return "kvm" if self.cpu else "tcg"


_KVM_CPU = {"x2apic": "host,-smap", "xapic": "host,-smap,-x2apic"}
ACCELS = {
    row.name: row
    for row in (
        AccelRow("tcg", "QEMU's emulation: everywhere the same"),
        AccelRow(
            "kvm",
            "this machine's /dev/kvm, which has x2APIC with every QEMU; only where the processor has SVM or VMX: there "
            "are others, which abort QEMU",
            _KVM_CPU,
        ),
        AccelRow("kvm-in-tcg", "AMD's KVM in a Linux under TCG: on any machine", _KVM_CPU, "on", True, slower=8.0),
        AccelRow(
            "kvm-split-in-tcg", "the same with the I/O APIC and PICs in QEMU", _KVM_CPU, "split", True, slower=8.0
        ),
    )
}
DEFAULT_ACCEL = "tcg"


@dataclass(frozen=True)
class GdbRow:
    """One gdb: the one that is installed, or (`requirement`) one from PyPI in a separate environment."""

    name: str
    reason: str
    requirement: str = ""


GDBS = {
    row.name: row
    for row in (
        GdbRow("debian", "Debian 12's 13.1, which embeds Debian's Python 3.11"),
        GdbRow(
            "18.1", "a current one; its Python is the one that made its environment", "gdb-for-pwndbg==18.1.0.post1"
        ),
    )
}
