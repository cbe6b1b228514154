"""Makes a process that loads tokenizers and never imports torch. Knows imports; never models or engines."""

from __future__ import annotations

import os
import sys


def do_without_torch() -> None:
    """Make every later import of torch in this process fail: transformers then loads tokenizers without it.

    Torch would take 2 s of the front process's start and 260 MB. Does nothing if torch is imported already.
    """
    if "torch" not in sys.modules:
        # None is Python's own mark for a module that does not exist
        sys.modules["torch"] = None  # type: ignore[assignment]
        before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would advise that models are not available
        try:
            import transformers  # noqa: F401
        finally:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
            if before is not None:
                os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before


def import_tokenizers() -> None:
    """Import what loading a tokenizer needs. Takes about a second, which can pass while an engine loads."""
    import transformers

    _ = transformers.AutoTokenizer
