"""What may go wrong here, in words for whoever runs it."""

from __future__ import annotations


class PeerError(Exception):
    """A system that could not be set up, started or measured. The others go on."""
