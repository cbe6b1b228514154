"""What prompts have in common at their beginnings, from hashes of their blocks. Knows hashes and their order;
never texts, files or times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import groupby

Block = tuple[Hashable, int]  # (hash, tokens)


class Tree:
    """All block sequences seen, as a tree: two nodes are one exactly if everything up to them is the same."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, Hashable], int] = {}

    def path(self, blocks: Sequence[Hashable]) -> list[int]:
        """The nodes of a sequence, from its beginning on; new ones where it was never seen."""
        nodes, node = [], 0
        for block in blocks:
            node = self._nodes.setdefault((node, block), len(self._nodes) + 1)
            nodes.append(node)
        return nodes


def shared_beginnings(prompts: Sequence[Sequence[Block]]) -> list[list[tuple[str, int]]]:
    """For each prompt, what it shares with others at its beginning: stretches (name, tokens), as few as tell
    who shares what.

    A stretch that two prompts share has the same name in both, and stands after the same stretches.
    """
    tree = Tree()
    paths = [tree.path(prompt) for prompt in prompts]
    uses = Counter(node for path in paths for node in path)
    found = []
    for prompt, path in zip(prompts, paths, strict=True):
        stretches = []
        # Fewer and fewer share, further into a prompt: where as many do, the same ones do.
        for sharers, stretch in groupby(zip(prompt, path, strict=True), key=lambda item: uses[item[1]]):
            if sharers > 1:
                items = list(stretch)
                stretches.append((str(items[0][1]), sum(tokens for (_, tokens), _ in items)))
        found.append(stretches)
    return found
