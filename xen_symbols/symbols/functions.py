"""What a symbol table of functions alone lacks, and why: said once, instead of for each variable."""

from __future__ import annotations

from xen_symbols.symbols.table import CARRIED, SymbolTable

BUILT_WITHOUT = "it was built without CONFIG_LIVEPATCH, or is older than 4.10"  # xen/Makefile, all_symbols
_OF_A_MAP = "the build of a Xen before 4.15 leaves variables out"


def names_no_variables(table: SymbolTable) -> str:
    """One clause, of a table that is `text_only`."""
    why = BUILT_WITHOUT if table.source == CARRIED else _OF_A_MAP
    return f"the {table.source} ({table.path}) has functions and no variables: {why}; give its xen-syms with --symbols"
