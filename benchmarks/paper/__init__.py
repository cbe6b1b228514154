"""The figures of the paper's evaluation, simulated with Pensieve's scheduler and cache.

    python benchmarks/paper [--figures 10a,14] [--out DIR]    (make paper-figures: all, into figures/)

Knows what the paper measured; the simulator does not.
"""
