"""What the processes of a server's prompts load: a model's tokenizer and template, without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pensieve.runtime.torchless import do_without_torch, import_tokenizers
from pensieve.text import ChatText
from pensieve.text.nursery import Nursery, new_nursery


def prepare() -> None:
    """Import what loading a tokenizer takes."""
    do_without_torch()
    import_tokenizers()


@dataclass(frozen=True, slots=True)
class Loading:
    """Loads a tokenizer and template, in another process."""

    folder: Path
    template: str | None  # in place of the model's own
    max_context: int

    def __call__(self) -> ChatText:
        """What it loads.

        Raises:
            ModelUnavailable: it cannot be read.
        """
        prepare()
        text = ChatText.load(self.folder, template=self.template)
        text.max_chars = text.most_chars(self.max_context)
        return text


class Nurseries:
    """Makes nurseries that have loaded; the first is there already."""

    def __init__(self, loading: Callable[[], ChatText], first: Nursery) -> None:
        self._loading = loading
        self._first: Nursery | None = first

    def __call__(self) -> Nursery:
        """The first one, or a fresh one.

        Raises:
            PensieveError: what loading raised.
        """
        nursery, self._first = self._first, None
        if nursery is None:
            nursery = new_nursery(prepare)
            try:
                nursery.load(self._loading)
            except BaseException:
                nursery.close()
                raise
        return nursery
