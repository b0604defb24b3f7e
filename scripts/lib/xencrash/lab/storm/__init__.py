"""Experiments on a crash: an NMI or a machine check at a chosen instruction, CPUs late, or in another order.

`begin` makes the snapshot and the recording that all share, `explore` the experiments, `run` makes them, each by a
`Driver` on a machine of its own, and `judge` says what each showed. `rsp` and `inject` write to the machine: nobody
else may use them.
"""
