"""Experiments on a crash: an NMI or a machine check at a chosen instruction, CPUs late, or in another order.

`begin` makes the snapshot and the recording that all share, `explore` the experiments, `run` runs them, each with a
`Driver` on a separate machine, and `judge` decides each outcome. `rsp` and `inject` write to the machine: nothing else
may use them.
"""
