"""What an instruction does to memory: bytes as an assembler makes them, with registers."""

from __future__ import annotations

import pytest

from xencrash.lab.storm.decode import Access, decode

REGISTERS = dict.fromkeys("rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15".split(), 0) | {
    "rax": 0x1000, "rbx": 0x20, "rcx": 3, "rdi": 0x5000, "rsi": 0x6000, "rsp": 0x9000,
    "gs_base": 0x700000, "fs_base": 0,
}  # fmt: skip


def accesses(code: str) -> list[Access]:
    return decode(0x400000, bytes.fromhex(code)).accesses(REGISTERS)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("488b00", [Access(0x1000, 8, False)]),  # mov (%rax),%rax
        ("c6401801", [Access(0x1018, 1, True)]),  # movb $1,0x18(%rax)
        ("8b0498", [Access(0x1080, 4, False)]),  # mov (%rax,%rbx,4),%eax
        ("488b0510000000", [Access(0x400017, 8, False)]),  # mov 0x10(%rip),%rax
        ("f048832000", [Access(0x1000, 8, True)]),  # lock andq $0,(%rax)
        ("f0480fb108", [Access(0x1000, 8, True)]),  # lock cmpxchg %rcx,(%rax)
        ("488708", [Access(0x1000, 8, True)]),  # xchg %rcx,(%rax)
        ("f0480fab08", [Access(0x1000, 8, True)]),  # lock bts %rcx,(%rax): bit 3
        ("658b042510000000", [Access(0x700010, 4, False)]),  # mov %gs:0x10,%eax
        ("f3a4", [Access(0x5000, 3, True), Access(0x6000, 3, False)]),  # rep movsb
        ("488d0498", []),  # lea (%rax,%rbx,4),%rax
        ("50", []),  # push %rax: the stack is a CPU's own
        ("c3", []),
        ("48cf", []),  # iretq
    ],
)
def test_memory_operands(code: str, found: list[Access]) -> None:
    assert sorted(accesses(code)) == sorted(found)


def test_a_bit_beyond_its_operand_is_where_it_is() -> None:
    code = bytes.fromhex("f0480fab08")  # lock bts %rcx,(%rax)
    assert decode(0, code).accesses(REGISTERS | {"rcx": 200}) == [Access(0x1000 + 24, 8, True)]
    assert decode(0, code).accesses(REGISTERS | {"rcx": (1 << 64) - 1}) == [Access(0x1000 - 8, 8, True)]


def test_what_is_not_an_instruction_is_reported() -> None:
    assert decode(0, b"\x06").text == "(bad)"


def test_size_and_text() -> None:
    found = decode(0x10, bytes.fromhex("0f011f"))
    assert (found.size, found.mnemonic, found.text) == (3, "lidt", "lidt [rdi]")
