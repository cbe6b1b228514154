"""A sequence: the token path of one conversation, as a list of chunks.

Knows counts and hashes; never tiers' bytes or text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence as Tokens
from itertools import islice

from pensieve.core.chunk import Chunk

DIGEST_BYTES = 16
IDLE_S = -1e12  # "last active" of a conversation whose user is done: long before every other
TENANT_END = "\x1f"  # a namespace is a tenant's name, or the name, this character and a salt

Key = tuple[str, str]  # (namespace, sequence id)


class Sequence:
    """One conversation's chunks, left to right; None where a chunk was dropped.

    Written by `TieredCache` only.
    """

    __slots__ = (
        "chunks",
        "kept",
        "key",
        "last_active_s",
        "leased",
        "num_active",
        "num_copied_out",
        "seen_s",
        "tail",
        "tail_parent",
    )

    def __init__(self, key: Key, now_s: float) -> None:
        self.key = key
        self.chunks: list[Chunk | None] = []
        self.tail: tuple[int, ...] = ()  # token ids of a partial last chunk while the sequence is not leased
        self.tail_parent = b""  # chain hash of what comes before the tail
        self.last_active_s = now_s  # for eviction: IDLE_S after an `Idle` hint
        self.seen_s = now_s  # when it was last active in fact
        self.num_active = 0  # requests that are queued, running or suspended
        self.num_copied_out = 0  # chunks swapped out since the last receipt
        self.leased = False
        self.kept = False

    def __repr__(self) -> str:
        return f"<sequence {self.key[1]!r} chunks={len(self.chunks)}>"


class Sharers:
    """The sequences through a shared chunk, and when the latest of them was active."""

    __slots__ = ("last_active_s", "members", "num_active")

    def __init__(self, members: set[Sequence]) -> None:
        self.members = members
        self.last_active_s = max(member.last_active_s for member in members)
        self.num_active = sum(member.num_active for member in members)

    def add(self, sequence: Sequence) -> None:
        """One more sequence."""
        self.members.add(sequence)
        self.num_active += sequence.num_active
        self.last_active_s = max(self.last_active_s, sequence.last_active_s)

    def discard(self, sequence: Sequence) -> None:
        """One sequence fewer. The time of last activity stays: it was a use of the chunk."""
        self.members.discard(sequence)
        self.num_active -= sequence.num_active


def sequences_of(chunk: Chunk) -> tuple[Sequence, ...]:
    """The sequences that run through a chunk."""
    owner = chunk.owner
    if isinstance(owner, Sequence):
        return (owner,)
    assert isinstance(owner, Sharers)
    return tuple(owner.members)


class Namespaces:
    """The namespaces of each tenant that hold sequences."""

    def __init__(self) -> None:
        self._of_tenant: dict[str, Counter[str]] = {}  # tenant -> namespace -> how many sequences

    def add(self, namespace: str) -> None:
        """A namespace has one more sequence."""
        self._of_tenant.setdefault(tenant_of(namespace), Counter())[namespace] += 1

    def discard(self, namespace: str) -> None:
        """A namespace has one sequence fewer."""
        counts = self._of_tenant[tenant_of(namespace)]
        counts[namespace] -= 1
        if not counts[namespace]:
            del counts[namespace]
        if not counts:
            del self._of_tenant[tenant_of(namespace)]

    def of(self, tenant: str) -> set[str]:
        """A tenant's namespaces."""
        return set(self._of_tenant.get(tenant, ()))

    def siblings(self, namespace: str, most: int) -> list[str]:
        """Other namespaces of the same tenant, at most `most`."""
        counts = self._of_tenant.get(tenant_of(namespace), Counter[str]())
        return [other for other in islice(counts, most + 1) if other != namespace][:most]

    def counts(self) -> dict[str, int]:
        """Sequences by namespace (for `check`)."""
        return {
            namespace: count for counts in self._of_tenant.values() for namespace, count in counts.items()
        }


def tenant_of(namespace: str) -> str:
    """The tenant (a credential's name) that a namespace belongs to."""
    return namespace.partition(TENANT_END)[0]


def chain_digest(parent: bytes, tokens: Tokens[int]) -> bytes:
    """The chain hash of a chunk's tokens after what `parent` stands for."""
    return _digest(parent, array("I", tokens).tobytes())


def root_digest(namespace: str) -> bytes:
    """The hash that every chain of a namespace starts from: equal tokens of two namespaces never match."""
    return hashlib.blake2b(namespace.encode(), digest_size=DIGEST_BYTES, person=b"pensieve-root").digest()


def extend_digests(digests: list[bytes], namespace: str, tokens: Tokens[int], chunk_tokens: int) -> None:
    """Append the chain hashes of the full chunks of `tokens` that `digests` does not cover yet.

    digest[i] = H(digest[i-1] + tokens of chunk i), so equal digests mean equal tokens from the root on.
    """
    first, last = len(digests), len(tokens) // chunk_tokens
    if first >= last:
        return
    parent = digests[-1] if digests else root_digest(namespace)
    chunks = array("I", tokens[first * chunk_tokens : last * chunk_tokens])
    flat, step = chunks.tobytes(), chunks.itemsize * chunk_tokens
    for at in range(0, len(flat), step):
        parent = _digest(parent, flat[at : at + step])
        digests.append(parent)


def _digest(parent: bytes, chunk: bytes) -> bytes:
    return hashlib.blake2b(parent + chunk, digest_size=DIGEST_BYTES).digest()
