"""What a parked CPU goes on with when something wakes it, from the code behind its HLT."""
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machines.changed import Machine
from xen_symbols.absence import Absent
from xen_symbols.report.model import Verdict
from xen_symbols.x86 import halt

START, AT, END = 0x1000, 0x1050, 0x1100


def again(code: str) -> bool | Absent:
    return halt.halts_again(bytes.fromhex(code), AT, (START, END))


@pytest.mark.parametrize(
    "code",
    [
        "ebfd",  # Xen 4.14 to 4.23: jmp back to the HLT
        "ebae",  # the function's first instruction
        "e9f2ffffff",  # jmp rel32
        "90 ebfc", "f390 ebfb", "0f1f00 ebfa", "0f1f440000 ebf8", "0f1f8000000000 ebf6",  # padding, PAUSE
    ],
)  # fmt: skip
def test_a_jump_back_halts_it_again(code: str) -> None:
    assert again(code) is True


@pytest.mark.parametrize(
    "code",
    [
        "c3", "c20800", "0f0b", "cc",
        "b801000000 488b5df8 c9 e91dccebff",  # 4.23, debug: halt(); return 1; by __x86_return_thunk
        "b801000000 5b 5d 415c 415d c3",  # 4.17's way to save registers
        "31c0 488b5c2408 4883c418 c3", "488d65f0 5b 5d c3", "4881c480000000 c3",
        "ebad",  # a byte before the function
        "e9ad000000",  # its end: the next function
    ],
)  # fmt: skip
def test_a_return_does_not(code: str) -> None:
    assert again(code) is False


@pytest.mark.parametrize("code", ["", "eb", "e9fdffff", "eb00", "ebfe", "74fd", "ff05fdffffff ebf7", "fa ebfd"])
def test_other_code_is_not_known(code: str) -> None:
    assert isinstance(again(code), Absent)


def test_code_that_runs_out_of_the_function_does_not_come_back() -> None:
    assert halt.halts_again(b"\x90\x90\xeb\xfb", END - 2, (START, END)) is False
    assert halt.halts_again(b"", END, (START, END)) is False


@given(st.binary(max_size=halt.READ))
def test_any_code_has_an_answer(code: bytes) -> None:
    found = halt.halts_again(code, AT, (START, END))
    assert found in (True, False) or isinstance(found, Absent)


@given(st.integers(-0x60, 0x200))
def test_it_comes_back_exactly_from_a_jump_into_what_is_before(target: int) -> None:
    found = halt.halts_again(b"\xe9" + (target - 5).to_bytes(4, "little", signed=True), AT, (START, END))
    assert (found is True) == (START <= AT + target < AT)
    assert isinstance(found, Absent) == (AT <= AT + target < END)


FUNCTIONS = {
    "int once(int a) { int here = a; use(&here); HLT; return 1; }": False,
    "int loop(int a) { int here = a; use(&here); for ( ; ; ) HLT; }": True,
}


@pytest.mark.parametrize(
    "options", ["-O0", "-O1", "-O2", "-Os", "-O2 -fno-omit-frame-pointer", "-O2 -falign-functions=32"]
)
def test_it_knows_what_a_compiler_makes_of_both(options: str, tmp_path: Path) -> None:
    source, made, text = tmp_path / "halt.c", tmp_path / "halt.o", tmp_path / "text"
    for function, loops in FUNCTIONS.items():
        source.write_text('#define HLT asm volatile ( "hlt" ::: "memory" )\nvoid use(int *);\n' + function)
        always = [*options.split(), "-fno-stack-protector", "-fcf-protection=none"]
        subprocess.run(["gcc", *always, "-c", source, "-o", made], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", made, text], check=True)
        code = text.read_bytes()
        behind = code.index(b"\xf4") + 1
        extent = AT - behind, AT - behind + len(code)
        assert halt.halts_again(code[behind : behind + halt.READ], AT, extent) is loops, function


RETURNS = bytes.fromhex("b801000000 488b5df8 c9 e91dccebff")


@pytest.mark.parametrize(
    ("code", "verdict", "observed"),
    [
        (b"\xeb\xfd", Verdict.PASS, "halted in do_nmi_crash, interrupts off"),
        (RETURNS, Verdict.FAIL, "halted once, in no loop, in do_nmi_crash+0x51, interrupts off"),
        (b"\xff\x05", Verdict.UNKNOWN, None),
    ],
)
def test_a_parked_cpu_whose_halt_is_in_no_loop_can_be_woken(
    code: bytes, verdict: Verdict, observed: str | None
) -> None:
    machine = Machine()
    machine.poke(machine.example.physical_cpus[1].registers["rip"], code)
    found = next(f for f in machine.report().findings if (f.check, f.cpu) == ("cpu-parked", 1))
    assert (found.verdict, found.observed) == (verdict, observed)
    if verdict is Verdict.UNKNOWN:
        assert str(found.reason).startswith("what it does behind its HLT is not known from the code there: ff 05 ")
