"""What llama.cpp says comes next: run in an environment of its own, one model file a process. Knows xllamacpp; never Pensieve.

    python next_token.py MODEL.gguf PROMPTS.json VOCAB_SIZE

`PROMPTS.json` is a list of lists of token ids; the last line printed is a list of lists, each with a log-probability for every token of the vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import xllamacpp

CONTEXT = 512  # tokens
WRITTEN = 32  # a printable token of the tiny vocabulary: the server leaves log-probabilities out where the token it writes is half a character


def main() -> None:
    model, prompts, size = (
        sys.argv[1],
        json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")),
        int(sys.argv[3]),
    )
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = (
        model,
        CONTEXT,
        1,
        False,
        False,
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    answers = []
    for prompt in prompts:
        asked = {
            "prompt": prompt,
            "n_predict": 1,
            "logprobs": size,
            "cache_prompt": False,
            "temperature": 0.0,
            "logit_bias": [[WRITTEN, 50.0]],
        }
        answer = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found = {
            token["id"]: token["logprob"]
            for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        }
        answers.append([found[token] for token in range(size)])
    print("\n" + json.dumps(answers), flush=True)
    os._exit(0)  # (its threads would be waited for)


if __name__ == "__main__":
    main()
