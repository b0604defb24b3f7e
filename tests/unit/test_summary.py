"""A crash on one page: which Xen, why, where, which vCPU, what the others did; and why what is not known is not."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.machines import recorded
from tests.machines.pages import HOSTILE, parsed
from tests.machines.recorded import load, write_files
from xen_symbols.absence import Absent
from xen_symbols.crashpath.engine import evaluate_if_possible
from xen_symbols.describe.summary import summarise
from xen_symbols.report.console import plain
from xen_symbols.report.page import summary_page
from xen_symbols.report.summary import headline, summary_blocks
from xen_symbols.xen.backtrace import Backtrace, Call, Step
from xen_symbols.xen.doing import Doing, doing
from xen_symbols.xen.frames import Frame
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reason import Reason, around, find_reason, lines_of_xen
from xen_symbols.xen.stacks import stacks_of_each
from xen_symbols.xen.state import read_state
from xen_symbols.xen.version import command_line, xen_version
from xencrash.cli import main

FAULT = "summary/4.17-page-fault"


def memory_of(name: str = FAULT) -> XenMemory:
    return locate(*load(name))


def summary_of(memory: XenMemory) -> Any:
    return json.loads(json.dumps(summarise(memory, evaluate_if_possible(memory).to_json())))


def write(memory: XenMemory, name: str, data: bytes, offset: int = 0) -> None:
    """Into a variable of a recorded Xen."""
    address = memory.physical(memory.symbols.address(name) + offset)
    memory.target.write(address, data)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def fault() -> Any:
    return summary_of(memory_of())


# -- a page fault in a hypercall of dom0 ------------------------------------------------------


def test_which_xen_it_is(fault: Any) -> None:
    assert fault["xen"] == {
        "version": "4.17.7", "changeset": "", "compile_date": "Wed Nov  4 16:52:28 UTC 2026",
        "compiler": "x86_64-linux-gnu-gcc (Debian 12.2.0-14+deb12u1) 12.2.0",
        "build_id": "151b373fd64b321593bf987fd923cd10dabadac4",
        "command_line": "xen com1=115200,8n1 console=com1 loglvl=all noreboot crashkernel=256M dom0_mem=512M "
                        "dom0_max_vcpus=4 dom0_vcpus_pin",
    }  # fmt: skip


def test_why_it_crashed(fault: Any) -> None:
    assert fault["why"] == {
        "id": "panic", "by": "its console and its call chain",
        "says": "FATAL PAGE FAULT, [error_code=0000], Faulting linear address: ffff87f000000000",
    }  # fmt: skip
    lines = fault["console"]["lines"]
    assert lines[fault["console"]["at"]] == "(XEN) Panic on CPU 2:"
    assert "(XEN) ----[ Xen-4.17.7  x86_64  debug=n  Not tainted ]----" in lines
    assert lines[-1] == "(XEN) Shot down all CPUs"


def test_where_it_crashed_and_what_ran_there(fault: Any) -> None:
    cpu = fault["crashing_cpu"]
    assert cpu["cpu"] == 2
    assert (cpu["doing"]["at"], cpu["doing"]["event"]) == ("do_kexec_op", "#PF")
    assert cpu["doing"]["calls"][0] == "pv_hypercall+0x56f/0x5b0"
    assert cpu["vcpu"] == {"name": "d0v2", "idle": False, "domain": 0, "vcpu": 2, "hardware_domain": True}


def test_the_registers_are_those_of_the_fault_as_xen_printed_them(fault: Any) -> None:
    registers = fault["crashing_cpu"]["registers"]
    printed = dict[str, int]()
    for line in fault["console"]["lines"]:
        words = line.removeprefix("(XEN) ").replace(": ", " ").split()
        if words and words[0] in ("rax", "rdx", "rbp", "r9", "r12", "r15", "cr3"):
            printed |= {name: int(value, 16) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert len(printed) == 20
    assert {name: int(registers[name], 16) for name in printed} == printed
    assert int(registers["rip"], 16) == 0xFFFF82D04021FEC0
    assert fault["crashing_cpu"]["registers_of"].startswith("the frame of #PF at 0xffff")


def test_the_other_cpus_in_groups_of_equals(fault: Any) -> None:
    assert fault["others"] == [
        {"domain": "idle", "doing": {"at": "default_idle", "event": "NMI"}, "cpus": [0, 1], "vcpus": []},
        {"domain": 0, "doing": {"at": "add_entry", "event": "NMI"}, "cpus": [3], "vcpus": [3]},
    ]


def test_what_the_dump_is_worth_and_what_the_crash_kernel_got(fault: Any) -> None:
    assert (fault["verdict"]["verdict"], fault["verdict"]["first"]) == ("pass", None)
    got = fault["crash_kernel"]
    assert got["loaded"] is True and got["area"]["size"] == 256 << 20 and got["area"]["image"] >> 20 == 65
    assert got["notes"] == [{"cpus": [0, 1, 2, 3], "state": "saved", "says": "complete"}] and got["info"]


def test_a_failure_is_named_in_the_first_lines() -> None:
    memory = memory_of()
    write(memory, "crash_saved_cpus", b"\x07")
    found = summary_of(memory)
    assert found["verdict"]["verdict"] == "fail"
    first = plain(summary_blocks(found)).splitlines()[:5]
    assert first[3] == (
        "verdict       FAIL: saved-cpus on CPU 3 at crashed: expected yes, observed no: "
        "its registers are missing from the dump"
    )


def test_a_xen_that_runs_has_not_crashed() -> None:
    found = summary_of(memory_of("4.17-normal"))
    assert (found["crashed"], found["crashing_cpu"], found["why"]) == (False, None, None)
    assert headline(found).endswith(" has not crashed")
    assert [group["cpus"] for group in found["others"]] == [[0, 1, 2, 3]]


def test_what_is_not_known_says_why() -> None:
    """Of a vmcore of which only what a judgement reads is there."""
    found = summary_of(memory_of("4.17-crashed-vmcore"))
    assert "version" in found["xen"]["absent"] and found["xen"]["version"] is None
    assert found["why"]["says"] is None and "console" in found["why"]["absent"]
    assert found["crashing_cpu"]["absent"].keys() == {"doing", "vcpu"}
    assert found["others"][0]["absent"].keys() == {"domain", "doing"}
    assert found["crash_kernel"]["area"] is None and "kexec_crash_area" in found["crash_kernel"]["absent"]["area"]


def test_a_crash_path_that_is_not_known_leaves_the_rest() -> None:
    memory = memory_of()
    memory.symbols._by_name.pop("do_nmi_crash")
    memory.symbols._remember()
    found = summary_of(memory)
    assert found["verdict"]["verdict"] == "unknown" and found["verdict"]["undecided"]
    assert found["crashing_cpu"]["cpu"] == 2  # as kexec.c noted it
    assert "not judged" in plain(summary_blocks(found)).splitlines()[3]


# -- the command ------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Any) -> None:
    vmcore, symbols = write_files(tmp_path, *load(FAULT))
    assert main(["summary", str(vmcore), "--symbols", str(symbols)]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"Xen 4.17.7 crashed on CPU 2: {fault['why']['says']}"
    assert second.split(None, 1)[1] == (
        "do_kexec_op (#PF), called by pv_hypercall; d0v2 was running (the hardware domain)"
    )
    output = str(tmp_path / "out")
    assert main(["summary", str(vmcore), "--symbols", str(symbols), "--format", "json", "--output", output]) == 0
    assert json.loads(Path(output).read_text())["why"] == fault["why"]


def test_it_can_be_rendered_later(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Any) -> None:
    report = tmp_path / "summary.json"
    report.write_text(json.dumps(fault))
    assert main(["render", str(report), "--format", "table"]) == 0
    assert capsys.readouterr().out == plain(summary_blocks(fault))
    assert main(["render", str(report)]) == 0
    assert capsys.readouterr().out == "".join(summary_page(fault))
    assert main(["render", str(report), "--format", "junit"]) == 3
    assert "a summary" in capsys.readouterr().err


# -- as a page, and what comes from a dump ----------------------------------------------------


def test_the_page(fault: Any) -> None:
    root = parsed("".join(summary_page(fault)))
    assert root.all("h1")[0].text() == headline(fault)
    names, values = ([one.text() for one in root.all(tag)] for tag in ("dt", "dd"))
    assert dict(zip(names, values, strict=True))["other CPUs"] == "CPUs 0-1 idle in default_idle; CPU 3 d0 in add_entry"
    console, registers, stack = (one.text() for one in root.all("pre"))
    assert "\n> (XEN) Panic on CPU 2:\n" in console
    assert "rip ffff82d04021fec0" in registers and "cr2 ffff87f000000000" in registers
    assert "#PF interrupted do_kexec_op" in stack
    assert [one.text() for one in root.all("td")][:4] == ["0-1", "idle", "default_idle", "NMI"]


def poisoned_memory() -> XenMemory:
    """The command line and what Xen printed are full of markup and escapes; and so is what a domain printed."""
    memory = memory_of()
    write(memory, "saved_cmdline", HOSTILE.encode() + b"\0")
    ring, size = memory.variable("conring"), memory.variable("conring_size", 4)
    held = memory.read(ring, min(size, memory.variable("conringp", 4)))
    at = held.index(b"FATAL PAGE FAULT")
    memory.target.write(memory.physical(ring) + at, HOSTILE.encode())  # type: ignore[attr-defined]
    domain = f"(d1) {HOSTILE}\n(XEN) ".encode()
    at = held.index(b"(XEN) PCI add device 0000:00:1f.2")
    memory.target.write(memory.physical(ring) + at, domain)  # type: ignore[attr-defined]
    return memory


def test_hostile_strings_stay_text() -> None:
    found = summary_of(poisoned_memory())
    text = plain(summary_blocks(found))
    assert all(line.isprintable() for line in text.splitlines())
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert text.count(shown) == 3  # the headline, the command line, the console: not what the domain printed
    page = "".join(summary_page(found))
    root = parsed(page)
    assert "\x1b" not in page and root.all("img") == root.all("script") == []
    assert root.all("h1")[0].text().startswith(f"Xen 4.17.7 crashed on CPU 2: {shown}")


def test_nothing_of_a_guest_is_shown_but_where_it_entered_xen(fault: Any) -> None:
    """Its general registers are in Xen's memory, too."""
    guest = fault["crashing_cpu"]["backtrace"]["guest"]
    assert guest.keys() == {"address", "vector", "event", "rip", "symbol", "cs", "rflags", "rsp", "ss"}


def test_the_command_without_a_xen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dump").write_bytes(bytes(1 << 20))
    assert main(["summary", str(tmp_path / "dump")]) == 3
    assert capsys.readouterr().err.count("\n") == 1


# -- why it crashed ---------------------------------------------------------------------------

STARS = "(XEN) ****************************************"
BUG = ["(XEN) ----[ Xen-4.20  x86_64 ]----", "(XEN) CPU:    1", STARS, "(XEN) Panic on CPU 1:",
       "(XEN) Xen BUG at common/kexec.c:123", STARS, "(XEN)", "(XEN) Executing kexec image on cpu1"]  # fmt: skip
KEY = ["(XEN) 'C' pressed -> triggering crashdump", "(XEN)  * no crash image loaded!"]
DOM0 = ["(XEN) Hardware Dom0 crashed: Executing kexec image on cpu3", "(XEN) Shot down all CPUs"]


@pytest.mark.parametrize(
    ("lines", "calls", "id", "says", "line"),
    [
        (BUG, ["kexec_crash", "panic", "do_invalid_op"], "panic", "Xen BUG at common/kexec.c:123", 3),
        (BUG, [], "panic", "Xen BUG at common/kexec.c:123", 3),
        (KEY + BUG, [], "panic", "Xen BUG at common/kexec.c:123", 5),
        (DOM0, ["kexec_crash", "hwdom_shutdown"], "domain", "the hardware domain crashed", 0),
        (["(XEN) Domain 0 crashed: "], ["kexec_crash", "dom0_shutdown"], "domain", "the hardware domain crashed", 0),
        (["(XEN) Hardware Dom0 shutdown: watchdog rebooting machine"], ["kexec_crash", "hwdom_shutdown"], "watchdog",
         "the watchdog of the hardware domain expired", 0),
        # The key did nothing; later dom0's kernel called kexec, for which Xen prints nothing.
        ([*KEY, "(XEN) Executing kexec image on cpu0"], ["kexec_crash", "do_kexec_op"], "hypercall",
         "the hardware domain's kernel started the crash kernel, as it does when it panics", None),
        # A second panic, on the crash path.
        (["(XEN) 'C' pressed -> triggering crashdump", "(XEN) Executing kexec image on cpu1", *BUG[:-1]],
         ["panic", "do_general_protection", "machine_kexec", "kexec_crash", "do_crashdump_trigger"], "key",
         "the crash key was pressed on Xen's console, or sent by dom0", 0),
        ([], ["kexec_crash", "panic"], "panic", "panic", None),
    ],
)  # fmt: skip
def test_why(lines: list[str], calls: list[str], id: str, says: str, line: int | None) -> None:
    found = find_reason(lines, calls)
    assert isinstance(found, Reason)
    assert (found.id, found.says, found.line) == (id, says, line)


def test_why_is_not_known() -> None:
    assert find_reason(["(XEN) Executing kexec image on cpu0"], []) is None
    assert find_reason([], ["kexec_crash", "somebody_new"]) is None


def test_only_xens_own_lines_count() -> None:
    """A guest prints there, too."""
    text = "(d5) (XEN) Panic on CPU 0:\r\n(XEN) one\nPanic on CPU 1:\n(XEN) two\n"
    assert lines_of_xen(text) == ["(XEN) one", "(XEN) two"]
    assert lines_of_xen("'C' pressed\nothers\n") == ["'C' pressed", "others"]


def test_a_panics_message_without_its_time_stamps() -> None:
    lines = ["(XEN) [   12.345678] Panic on CPU 0:", "(XEN) [   12.345679] FATAL TRAP: vector = 8", STARS]
    found = find_reason(lines, [])
    assert found is not None and found.says == "FATAL TRAP: vector = 8"


def test_the_lines_around_begin_with_the_registers_that_a_panic_prints() -> None:
    lines = ["old"] * 100 + ["(XEN) ----[ Xen-4.20 ]----"] + ["x"] * 60 + BUG[3:] + ["later"] * 100
    start, end = around(lines, 161)
    assert (start, end) == (92, 191)
    assert around(lines, None) == (len(lines) - 30, len(lines))
    assert around(lines[:3], 1) == (0, 3)


# -- which Xen --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["b804000000c3", "f30f1efab804000000c3", "b804000000e916e6fcff"])
def test_a_version_by_the_constants_that_functions_return(code: str) -> None:
    memory = memory_of()
    write(memory, "xen_major_version", bytes.fromhex(code))
    assert xen_version(memory).text == "4.17.7"


def test_a_version_by_a_function_that_does_more() -> None:
    memory = memory_of()
    write(memory, "xen_major_version", bytes.fromhex("55"))
    assert xen_version(memory).text == Absent("xen_major_version() does not begin with the constant that it returns")


def test_a_command_line_is_cut_at_its_size_and_has_no_escapes() -> None:
    memory = memory_of()
    write(memory, "saved_cmdline", b"a\x1b[31m\xff\0")
    assert command_line(memory) == "a\\x1b[31m\\xff"


# -- which vCPU -------------------------------------------------------------------------------


def test_a_vcpu_by_another_offset_of_its_domain() -> None:
    """As since 4.20: struct vcpu has its domain 8 bytes further on, and something else before it."""
    memory = memory_of()
    target: recorded.Example = memory.target  # type: ignore[assignment]
    state = read_state(memory)
    current = {stacks.current for stacks in stacks_of_each(memory, state, list(state.cpus.values())).values()}
    idle = {memory.read_uint(memory.symbols.address("idle_vcpu") + 8 * cpu) for cpu in range(4)}
    for vcpu in current | idle:
        at = memory.physical(vcpu)
        target.write(at + 16, bytes(8) + target.read_physical(at + 16, 8))
    found = summary_of(memory)
    assert found["crashing_cpu"]["vcpu"]["name"] == "d0v2"
    assert [group["domain"] for group in found["others"]] == ["idle", 0]


def test_a_vcpu_where_no_idle_one_leads_to_the_idle_domain() -> None:
    memory = memory_of()
    vcpu = memory.read_uint(memory.symbols.address("idle_vcpu"))
    domain = memory.read_uint(vcpu + 16)
    memory.target.write(memory.physical(domain), struct.pack("<H", 3))  # type: ignore[attr-defined]
    absent = summary_of(memory)["crashing_cpu"]["absent"]["vcpu"]
    assert absent.startswith("where a vCPU has its domain is not known")


# -- what a CPU did ---------------------------------------------------------------------------


def step(name: str, *calls: str, vector: int | None = None, cs: int = 0xE008) -> Step:
    frame = None if vector is None else Frame(0, vector, 0, cs, 2, 0, 0)
    return Step(0, 0, cs, name, None, "", frame, [Call(0, 0, f"{call}+0x1/0x2") for call in calls])


SAVING = step("kexec_crash_save_cpu+0xb2", "do_nmi_crash", "do_nmi", "handle_ist_exception")
GUEST = Frame(0, 2, 0x1000, 0xE033, 2, 0, 0xE02B)


@pytest.mark.parametrize(
    ("steps", "guest", "found"),
    [
        ([SAVING, step("default_idle+0x1", "idle_loop", vector=2)], None, ("default_idle+0x1", "NMI")),
        ([SAVING], GUEST, (None, "NMI")),
        ([SAVING, step("0x1000", vector=2, cs=0xE033)], None, (None, "NMI")),
        # An HVM guest: the NMI ended it, and no frame is there.
        ([step("kexec_crash_save_cpu+0xb2", "do_nmi_crash", "do_nmi", "svm_vmexit_handler")], None,
         ("svm_vmexit_handler+0x1/0x2", None)),
        ([step("do_nmi_crash+0x60", "do_nmi"), step("schedule+0x1", vector=2)], None, ("schedule+0x1", "NMI")),
        ([step("kexec_crash+0x1", "panic", "do_page_fault", "left_over"), step("bad+0x1", vector=14)], None,
         ("bad+0x1", "#PF")),
        ([step("kexec_crash_save_cpu", "kexec_crash", "panic", "tasklet_kill")], GUEST, ("tasklet_kill+0x1/0x2", None)),
        # It died of a #GP on the crash path, which a panic had begun.
        ([step("machine_halt+0x1", "panic", "do_general_protection"),
          step("machine_kexec+0x1", "kexec_crash", "panic", "do_page_fault", vector=13),
          step("bad+0x1", vector=14)], None, ("bad+0x1", "#PF")),
        ([step("default_idle+0x1", "idle_loop")], None, ("default_idle+0x1", None)),
        ([step("0x1000", cs=0xE033)], None, (None, None)),
    ],
)  # fmt: skip
def test_what_a_cpu_did(steps: list[Step], guest: Frame | None, found: tuple[str | None, str | None]) -> None:
    did = doing(Backtrace(0, "", steps=steps, guest=guest, end="as it ends"))
    assert isinstance(did, Doing)
    assert (did.at, did.event) == found


def test_what_a_cpu_did_is_not_known() -> None:
    assert doing(Backtrace(0, "", Absent("no registers"))) == Absent("no registers")
    assert doing(Backtrace(0, "", steps=[SAVING], end="lost")) == Absent("only the crash path is on its stack: lost")
    assert doing(Backtrace(0, "", steps=[step("0x200000")], end="not Xen")) == Absent("not Xen")
