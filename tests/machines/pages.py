"""A page of HTML as its parser sees it, and reports to make pages of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from tests.machines.changed import NMI, Machine

VOID = {"meta", "input", "br"}
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\"'&\u202e<b>"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Those within that have the tag and the words in these attributes (`class_` for class), in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                wanted = {name.rstrip("_"): value for name, value in attributes.items()}
                if tag in ("", child.tag) and all(v in child.attributes.get(n, "").split() for n, v in wanted.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(page: str) -> Element:
    """The page's root; every element must be closed where it belongs."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"<{parser.open[-1].tag}> stays open"
    return parser.root


def traced(*examples: str) -> Any:
    """A report of several stages: recorded ones, one after the other, of which the second fails on CPUs 1 and 2."""
    reports = []
    for number, name in enumerate(examples):
        machine = Machine(name)
        if number == 1:
            for cpu in (1, 2):
                machine.gate(cpu, NMI, 4, b"\x00")
        reports.append(machine.report().to_json())
    made: Any = {**reports[-1], "findings": [], "stages": [], "verdict": "fail"}
    for number, one in enumerate(reports):
        made["stages"] += one["stages"]
        made["findings"] += [{**finding, "stop": number} for finding in one["findings"]]
    return made


def poisoned(value: Any) -> Any:
    """Every text in a report but those of which the contract lists the values, and every name of a check or stage."""
    if isinstance(value, dict):
        return {name: one if name in ("verdict", "role") else poisoned(one) for name, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    if not isinstance(value, str) or re.fullmatch("0x[0-9a-f]+|[a-z]+-gate-[a-z]+", value):
        return value
    return value + HOSTILE
