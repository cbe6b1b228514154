"""Pensieve beside its peers: each server set up by itself, the same conversations for all in turn, one table.

    python benchmarks/peers [--workloads users,fits] [--systems pensieve,vllm] [--rounds 2] [--quick] [--peers DIR] [--out DIR]

Knows the servers' command lines and what `pensieve bench` reports; imports nothing of any engine.
"""
