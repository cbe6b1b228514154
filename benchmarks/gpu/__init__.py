"""What a GPU makes of Pensieve: kernel, transfers, steps, serving, each against a limit or a baseline measured in the same run.

    python benchmarks/gpu                 the scripts in order, and their commands
    python benchmarks/gpu --run --out DIR all of them, one after the other

Needs torch, numpy, transformers and Pensieve's engine side; no server package, no terminal package.
"""
