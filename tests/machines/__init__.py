"""Makers of machines for tests: Xens written by hand, recorded, and changed; and of the files that hold them.

`recorded` loads recorded real Xens, `changed` is one of them with helpers that change it, and the changes that a
check must find. `syntheticxen` writes a Xen from nothing, `stacks` one CPU's stacks. `dumpwriter` and `elfwriter` write
files, `damage` bounds what a damaged one may cost. tests/live/machines.py has those of the lab.
"""
