"""The same scheduler and cache in virtual time, on a worker that costs instead of computing. Knows no
tensors, servers or wall clocks.
"""
