"""The version that the package, the command and every report have."""

VERSION = "0.1.0"
