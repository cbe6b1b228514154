"""vLLM under the same arrivals, in a process of its own: settings as JSON on stdin, what came of them as the last line of stdout.

Run by `serving.py`; needs vLLM, and Pensieve's workloads on the path. Written for vLLM 0.20 to 0.32 (`AsyncLLM`, `kv_cache_memory_bytes`, `kv_offloading_size`).
Random weights, token ids in and out, no tokenizer, its makers' defaults for everything else.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

if (
    not __package__
):  # Python puts this very folder on its path, whose modules are meant to be found in their package only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gpu.arrivals import Answer, Load, sweep


class VllmServer:
    """vLLM's asynchronous engine; its core runs in a process of its own."""

    def __init__(self, asked: dict[str, Any], max_context: int) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        offload = {} if asked["cpu_gib"] is None else {"kv_offloading_size": asked["cpu_gib"]}
        self.engine: Any = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=asked["folder"], skip_tokenizer_init=True, load_format="dummy", dtype=asked["dtype"], max_model_len=max_context,
                enable_prefix_caching=True, kv_cache_memory_bytes=asked["gpu_bytes"], **offload,
            )
        )  # fmt: skip
        self._numbers = itertools.count()

    async def ask(self, conversation: str, prompt: tuple[int, ...], history: int, new: int) -> Answer:
        """See `arrivals.Server`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=new,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        begin, first_s, cached = time.monotonic(), None, 0
        tokens: list[int] = []
        async for output in self.engine.generate(
            {"prompt_token_ids": list(prompt)}, params, str(next(self._numbers))
        ):
            tokens += output.outputs[0].token_ids
            if first_s is None and tokens:
                first_s = time.monotonic() - begin
            cached = max(cached, output.num_cached_tokens or 0)
        return Answer(tuple(tokens), first_s, cached)

    async def clear(self) -> None:
        """See `arrivals.Server`; requests under way were given up by their conversations, which aborts them."""
        await asyncio.sleep(0.5)
        await self.engine.reset_prefix_cache()


async def main() -> None:
    asked = json.loads(sys.stdin.read())
    begin = time.monotonic()
    load = Load.from_json(asked["load"])
    server = VllmServer(asked, load.max_context)
    try:
        print(f"vLLM started in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        told = await sweep(
            server, load, limit_ms=asked["limit_ms"], first_rate=asked["first_rate"], say=lambda text: print(f"vllm {text}", file=sys.stderr),
            left_s=lambda: asked["left_s"] - (time.monotonic() - begin),
        )  # fmt: skip
    finally:
        server.engine.shutdown()
    print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
