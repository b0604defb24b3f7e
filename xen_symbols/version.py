"""The version that the package, the command and every report have."""
from __future__ import annotations

VERSION = "0.1.0"
