"""What other arithmetic does to a model's answers: perplexity on the shipped conversations, and how far log-probabilities move.

    python benchmarks/quality.py [--conversations 24] [--context 1024]

What the system prompts and users of the shipped conversations say is scored token by token (teacher-forced) three times: by the model's modules, by the fused forward, and by the
fused forward with weights of 8 bits, all in bfloat16 on a CPU. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from typing import Any

import torch
from common import commit

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.runtime.loading import LoadedModel, load_model
from pensieve.runtime.options import Options
from pensieve.worker.attention import PagedAttention, make_backend
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.kv_store import KVStore
from pensieve.workloads.conversations import load_dataset, select

CHUNK = 32
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a conversation, at most")
    arguments = parser.parse_args()
    kinds: dict[str, Options] = {
        "modules": Options(dtype="bfloat16", forward="modules"),
        "fused": Options(dtype="bfloat16", forward="fused"),
        "fused int8": Options(dtype="bfloat16", forward="fused", quantize="int8"),
    }
    texts: list[list[int]] = []
    scores: dict[str, list[torch.Tensor]] = {}
    seconds: dict[str, float] = {}
    for name, options in kinds.items():
        loaded = load_model(options, must_talk=True, say=lambda text: print(text, file=sys.stderr))
        texts = texts or conversations(loaded, arguments.conversations, arguments.context)
        began_s = time.monotonic()
        scores[name] = [score(loaded, tokens) for tokens in texts]
        seconds[name] = time.monotonic() - began_s
    truth = torch.cat(scores["modules"])
    results: dict[str, Any] = {}
    for name, parts in scores.items():
        own = torch.cat(parts)
        results[name] = {
            "perplexity": math.exp(-float(own.mean())),
            "mean_difference_nats": float(
                (own - truth).mean()
            ),  # of the log-probability of the next token, to that of the modules
            "mean_absolute_difference_nats": float((own - truth).abs().mean()),
            "seconds": round(seconds[name], 2),
        }
        print(f"{name:12} perplexity {results[name]['perplexity']:.4f}", file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "quality",
                "commit": commit(),
                "command": sys.argv,
                "date": time.strftime("%Y-%m-%d"),
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "tokens_scored": len(truth),
                "conversations": len(texts),
                "results": results,
            }
        )
    )


def conversations(loaded: LoadedModel, count: int, context: int) -> list[list[int]]:
    """Token ids of what the shipped conversations' system prompts and users say."""
    assert loaded.text is not None
    chosen = select(load_dataset(None), count, 1, 1 << 30).conversations
    return [
        loaded.text.encode_text("\n\n".join([conversation.system or "", *conversation.turns]))[:context]
        for conversation in chosen
    ]


def score(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """(n - 1,), the log-probability of each token after those before it."""
    model = loaded.model
    backend = make_backend("auto", model.geometry, CHUNK, CPU)
    num_chunks = -(-len(tokens) // CHUNK)
    backend.bind(KVStore(num_chunks, model.geometry.num_layers, backend.layer_bytes, CPU))
    builder = BatchBuilder(CHUNK, CPU)
    builder.update([BlockTableUpdate("text", 0, tuple(range(num_chunks)))])
    batch = builder.build((Span("text", 0, len(tokens), tuple(tokens), True),), lambda span: 0)
    logits = model.logits(
        batch.input_ids, batch.position_ids, torch.arange(len(tokens)), PagedAttention(backend, batch)
    )
    logprobs = torch.log_softmax(logits[:-1].float(), dim=-1)
    return logprobs.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)


if __name__ == "__main__":
    main()
