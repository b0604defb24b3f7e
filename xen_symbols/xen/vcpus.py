"""Which vCPU runs on each CPU, and its domain (xen/include/xen/sched.h).

struct vcpu begins with vcpu_id, and struct domain with domain_id, in every release; where struct vcpu has its domain
differs (16, and 24 in 4.20). That is found by evidence: each idle vCPU leads to the idle domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reads import unsigned
from xen_symbols.xen.stacks import CpuStacks

DOMID_FIRST_RESERVED = 0x7FF0  # xen/include/public/xen.h: no guest has this or a larger one
DOMID_IDLE = 0x7FFF  # xen/include/xen/sched.h
_SEARCHED = 64  # bytes of struct vcpu
_HARDWARE_DOMAIN = ("hardware_domain", "dom0")  # xen/common/domain.c; the latter where there is no hardware_domain yet


class Vcpu(NamedTuple):
    """`domain` is a domid; `hardware_domain` whether it is Xen's hardware_domain, Absent if that is not known."""

    domain: int
    number: int
    hardware_domain: bool | Absent

    @property
    def idle(self) -> bool:
        return self.domain == DOMID_IDLE

    @property
    def name(self) -> str:
        """As Xen's %pv prints it, but for the idle one."""
        return "idle" if self.idle else f"d{self.domain}v{self.number}"


def running_vcpus(memory: XenMemory, stacks: Mapping[int, CpuStacks | Absent]) -> dict[int, Vcpu | Absent]:
    """The vCPU of each CPU by `current` in its stacks, in three batches of reads; why not, where it is not known."""
    pointers = {cpu: one if isinstance(one, Absent) else one.current for cpu, one in stacks.items()}
    try:
        at = _domain_offset(memory, sorted(pointers))
    except Unreadable as error:
        at = error.absent
    if isinstance(at, Absent):
        return dict.fromkeys(pointers, at)
    known = {cpu: one for cpu, one in pointers.items() if not isinstance(one, Absent)}
    structs = dict(zip(known, memory.read_many([(one, _SEARCHED) for one in known.values()]), strict=True))
    domains = {cpu: unsigned(raw[at : at + 8]) for cpu, raw in structs.items() if not isinstance(raw, Absent)}
    domids = dict(zip(domains, memory.read_many([(one, 2) for one in domains.values()]), strict=True))
    hardware = _hardware_domain(memory)
    found: dict[int, Vcpu | Absent] = {}
    for cpu, pointer in pointers.items():
        parts = [pointer, structs.get(cpu), domids.get(cpu)]
        missing = next((part for part in parts if isinstance(part, Absent)), None)
        found[cpu] = missing or _vcpu(structs[cpu], domids[cpu], domains[cpu], hardware)  # type: ignore[arg-type]
    return found


def _vcpu(struct: bytes, domid: bytes, domain: int, hardware: int | Absent) -> Vcpu | Absent:
    number = unsigned(domid)
    if number >= DOMID_FIRST_RESERVED and number != DOMID_IDLE:
        return Absent(f"what runs there is not a vCPU: its domain would be {number:#x}")
    return Vcpu(number, unsigned(struct[:4]), hardware if isinstance(hardware, Absent) else domain == hardware)


def _domain_offset(memory: XenMemory, cpus: Sequence[int]) -> int | Absent:
    """Where struct vcpu has its domain. Raises Unreadable."""
    start = memory.symbols.address("idle_vcpu", DATA)
    pointers = memory.read_many([(start + 8 * cpu, 8) for cpu in cpus])
    idle = [unsigned(one) for one in pointers if not isinstance(one, Absent) and any(one)]
    structs = [one for one in memory.read_many([(one, _SEARCHED) for one in idle]) if not isinstance(one, Absent)]
    if not structs:
        return Absent("no idle vCPU could be read, by which a vCPU's domain is found")
    for at in range(8, _SEARCHED, 8):
        words = {struct[at : at + 8] for struct in structs}
        if len(words) == 1 and (domain := unsigned(words.pop())):
            answer = memory.read_many([(domain, 2)])[0]
            if not isinstance(answer, Absent) and unsigned(answer) == DOMID_IDLE:
                return at
    return Absent("where a vCPU has its domain is not known: no word of the idle ones leads to the idle domain")


def _hardware_domain(memory: XenMemory) -> int | Absent:
    """Its address. Where Xen has hardware_domain, the symbol `dom0` is something else."""
    try:
        name = next(name for name in _HARDWARE_DOMAIN if memory.symbols.get(name, DATA) is not None)
        return memory.variable(name, 8, DATA)
    except StopIteration:
        return Absent("the symbols do not name hardware_domain")
    except Unreadable as error:
        return error.absent
