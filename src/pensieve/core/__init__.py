"""What is decided: scheduling, placement, eviction, recovery.

Standard library only; told the time, never asks it.
"""
