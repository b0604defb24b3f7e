"""The report's contract, to validate reports against."""
from __future__ import annotations

import json
from pathlib import Path

import xen_symbols.report

SCHEMA = json.loads((Path(xen_symbols.report.__file__).parent / "schema.json").read_text())
