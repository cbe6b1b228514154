"""From options to a running engine: finds a model, sizes tiers, wires worker, scheduler, engine, text, store.

Knows how every room below is made; never clients.
"""
