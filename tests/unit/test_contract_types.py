"""The contract's types say what schema.json says, field by field: neither can change alone."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from tests.schema import SCHEMA as PUBLISHED
from xen_symbols.report import contract

SCHEMA = copy.deepcopy(PUBLISHED)
SCALARS = {"string": str, "integer": int, "boolean": bool, "null": type(None)}


def differences(hint: Any, schema: dict[str, Any], where: str = "report") -> Iterator[str]:
    """The differences between a type and a schema of one value."""
    schema = resolved(schema)
    types_, schemas = alternatives(hint), choices(schema)
    if (type(None) in types_) != any(is_null(each) for each in schemas):
        yield f"{where}: null"
    types_ = [each for each in types_ if each is not type(None)]
    schemas = [each for each in schemas if not is_null(each)]
    if len(types_) != len(schemas):
        yield f"{where}: {types_} and {schemas}"
        return
    for each, said in zip(types_, schemas, strict=True):
        yield from of_one(each, said, where)


def of_one(hint: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if is_typeddict(hint):
        yield from of_object(hint, schema, where)
    elif get_origin(hint) is list:
        if schema.get("type") != "array":
            yield f"{where}: no array"
        else:
            yield from differences(get_args(hint)[0], schema["items"], f"{where}[]")
    elif get_origin(hint) is dict:
        if schema.get("type") != "object" or "properties" in schema:
            yield f"{where}: no object of any names"
        else:
            yield from differences(get_args(hint)[1], schema["additionalProperties"], f"{where}{{}}")
    elif get_origin(hint) is Literal:
        if listed is None or {*get_args(hint)} != {value for value in listed if value is not None}:
            yield f"{where}: {get_args(hint)} and {listed}"
    elif hint is Any:
        if schema.keys() & {"type", "enum", "const", "anyOf"}:
            yield f"{where}: more is known of it"
    elif listed is not None:  # a type may be wider than a list of values
        if {type(value) for value in listed} != {hint}:
            yield f"{where}: {hint} and {listed}"
    elif SCALARS.get(schema.get("type", "")) is not hint:
        yield f"{where}: {hint} and {schema}"


def of_object(hint: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    if schema.get("type") != "object" or "properties" not in schema:
        yield f"{where}: no object with names"
        return
    fields = get_type_hints(hint)
    for name in fields.keys() ^ schema["properties"].keys():
        yield f"{where}.{name}: in one alone"
    for name in hint.__required_keys__ ^ set(schema.get("required", ())):
        yield f"{where}.{name}: required in one alone"
    for name in fields.keys() & schema["properties"].keys():
        yield from differences(fields[name], schema["properties"][name], f"{where}.{name}")


def alternatives(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def choices(schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "anyOf" in schema:
        return [resolved(each) for each in schema["anyOf"]]
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": each} for each in schema["type"]]
    if None in schema.get("enum", ()):
        return [{"type": "null"}, {**schema, "enum": [value for value in schema["enum"] if value is not None]}]
    return [schema]


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: dict[str, Any] = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    return found


def is_null(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "null"


def test_the_types_are_the_schemas() -> None:
    assert list(differences(contract.Report, SCHEMA)) == []


def test_every_type_is_part_of_a_report() -> None:
    """A type that is not compared with the schema could change freely."""
    met: set[str] = set()

    def meet(hint: Any) -> None:
        if is_typeddict(hint) and hint.__name__ not in met:
            met.add(hint.__name__)
            for each in get_type_hints(hint).values():
                meet(each)
        for each in get_args(hint):
            meet(each)

    meet(contract.Report)
    fields = {name: get_type_hints(value).items() for name, value in vars(contract).items() if is_typeddict(value)}
    assert [name for name in fields if not any(fields[name] <= fields[one] for one in met)] == []
    assert len(met) > 12


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ((), {"required": ["schema"]}, "report.tool: required in one alone"),
        (("properties", "crashing_cpu"), {"$ref": "#/$defs/verdict"}, "report.crashing_cpu: null"),
        (("$defs", "gate", "properties"), {"type": {"type": "string"}}, "report.cpus[].nmi_gate.type: "),
        (("$defs", "gate", "properties"), {"new": {"type": "string"}}, "report.cpus[].nmi_gate.new: in one alone"),
        (("$defs", "verdict"), {"enum": ["pass", "fail"]}, "report.verdict: "),
        (("$defs", "place"), {"required": ["pc"]}, "report.stages[].at.symbol: required in one alone"),
        (("properties", "stages"), {"type": "object"}, "report.stages: no array"),
        (("properties", "findings", "items", "properties", "evidence", "items", "properties"),
         {"symbol": {"type": ["string", "null"]}}, "report.findings[].evidence[].symbol: null"),
        (("properties", "findings", "items", "properties", "expected"), {"type": "string"},
         "report.findings[].expected: more is known of it"),
        (("properties", "gate_changes", "items", "properties", "vector"), {"enum": ["NMI"]},
         "report.gate_changes[].vector: "),
    ],
)  # fmt: skip
def test_a_difference_is_found(path: tuple[str, ...], change: dict[str, Any], said: str) -> None:
    before = copy.deepcopy(SCHEMA)
    part = SCHEMA
    for name in path:
        part = part[name]
    try:
        part.update(change)
        found = list(differences(contract.Report, SCHEMA))
    finally:
        SCHEMA.clear()
        SCHEMA.update(before)
    assert any(each.startswith(said) for each in found), found
