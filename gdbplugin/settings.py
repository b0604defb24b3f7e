"""What `set xen …` sets, and the convenience functions."""

from __future__ import annotations

from gdbplugin.declare import Setting

SETTINGS = (
    Setting("symbols", "PARAM_OPTIONAL_FILENAME", "the file with Xen's symbols",
            "Its xen-syms, a .map, or the image. Empty: the first file loaded into gdb that is Xen's, else the table\n"
            "that Xen carries in its own image."),
    Setting("qmp-socket", "PARAM_OPTIONAL_FILENAME", "QEMU's QMP socket (a unix socket's path, or HOST:PORT)",
            "Through it come the LAPIC mode, the NMI latch and pending NMIs of every CPU, also of halted ones.\n"
            "Empty: QEMU's monitor is asked through gdb, which has no answer for those."),
    Setting("allow-build-id-mismatch", "PARAM_BOOLEAN", "whether symbols of another build are used",
            "Off: they are refused. On: they are used, and every report says so."),
    Setting("generation", "PARAM_STRING", "the generation of the crash path, where it is not to be recognised",
            "For a patched Xen: the generation that its crash path comes from (xencrash lab guests lists them).\n"
            "Reports say that it was given. Empty: it is recognised."),
    Setting("aliases", "PARAM_STRING", "names that a patched Xen has changed: NAME=ACTUAL, separated by spaces",
            "Where the crash path's NAME is meant, this Xen has ACTUAL: do_nmi_crash=my_nmi_crash. Reports call it\n"
            "NAME, and list the aliases. Empty: none."),
    Setting("rdmsr", "PARAM_BOOLEAN", "whether the LAPIC mode may be read by executing an rdmsr on each CPU",
            "Needed only without QMP. It executes one instruction of Xen's on each CPU that is awake in Xen, with the\n"
            "registers put back afterwards; halted CPUs are left alone. For the command line alone, not for -xen-…\n"
            "commands, and not under KVM, where the step would not end. Off: no register is ever changed."),
)  # fmt: skip

# Convenience functions, by name.
FUNCTIONS = {
    "xen_per_cpu": """$xen_per_cpu("NAME", CPU): the value of a per-CPU variable of Xen's.

It has the variable's type where the symbols carry debug information; else it is an unsigned
integer of the variable's size (1, 2, 4 or 8 bytes), or an array of unsigned char.
It is a copy, read by Xen's own page tables whatever CPU is selected: it has no address
(xen percpu shows that), and assigning to it changes nothing in the machine.""",
    "xen_gate": """$xen_gate(CPU, VECTOR): the handler in one of Xen's interrupt gates, a pointer to a function.

print shows its symbol, too; x/i $xen_gate(0, 2) its first instruction.""",
}
