"""Bytes to values, as the processor manuals define them."""
