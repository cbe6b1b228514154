"""The engine: an inbox, a step loop and the process around them.

Knows commands, events and clocks; never tensors, text or requests over HTTP.
"""
