"""The xencrash command."""
