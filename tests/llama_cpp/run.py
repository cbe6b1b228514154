"""Acceptance: GGUF files as llama.cpp reads them, beside the model each was made from and the one that Pensieve makes of it.

    python tests/llama_cpp/run.py [-k WORDS] [--venv DIR]

Writes the tiny models of `tests/worker/test_gguf_architectures.py`, makes an environment with llama.cpp if it is missing (`requirements.txt`),
and compares the log-probabilities of the next token after 9 and after 300 tokens. Where llama.cpp and transformers are known to differ, the
reason stands here, and Pensieve is held to transformers. The exit status says whether all is as written here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "worker")]

import test_gguf_architectures as architectures  # noqa: E402
import torch  # noqa: E402

from tiny_gguf import VOCAB_SIZE, tiny, write_gguf  # noqa: E402

LENGTHS = (9, 300)  # tokens
CLOSE = 1e-4  # of a log-probability, in float32
TABLE = 1e-2  # llama.cpp looks GELU up in a table of float16
GELU = ("gemma", "starcoder2", "gpt2", "phi", "gpt_neox")
TIMEOUT_S = 60.0
YARN_BETAS = (
    "it takes beta_fast, beta_slow and the attention factor of yarn from its command line, not from the file"
)
DIFFERENT = {
    "llama, yarn with all numbers": YARN_BETAS,
    "gpt_oss": "it rounds the bounds of yarn's ramp, which this model asks not to do (truncate: false)",
    "phi3, a window": "it leaves phi3's window out",
    "phi3, longrope": "it chooses the long factors by the size of the context, transformers by the length of the prompt",
}
NOT_LOADED = {
    "starcoder2, no biases": "it wants biases",
    "gpt_neox, serial": "it wants biases of attention",
    "cohere, norms of queries and keys": "it expects them from 64 layers on",
}


def environment(folder: Path) -> Path:
    """The Python of the environment with llama.cpp, made if it is missing or its requirements have changed."""
    python, stamp, requirements = (
        folder / "bin/python",
        folder / "requirements.sha256",
        HERE / "requirements.txt",
    )
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if not (stamp.is_file() and stamp.read_text(encoding="ascii") == wanted):
        print(f"making an environment with llama.cpp in {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "--disable-pip-version-check",
                "--quiet",
                "install",
                "-r",
                str(requirements),
            ],
            check=True,
        )
        stamp.write_text(wanted, encoding="ascii")
    return python


def prompts() -> list[list[int]]:
    """Random ids, none of them a special token: llama.cpp may treat those in its own way."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def after(model: Any, asked: list[list[int]]) -> torch.Tensor:
    """(prompts, V): log-probabilities of the next token."""
    with torch.inference_mode():
        found = [
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)
            for ids in asked
        ]
    return torch.stack(found)


def by_llama_cpp(python: Path, path: Path, asked: list[list[int]]) -> torch.Tensor | None:
    """The same from llama.cpp; None if it does not load the file."""
    listed = path.with_suffix(".json")
    listed.write_text(json.dumps(asked), encoding="utf-8")
    command = [str(python), str(HERE / "next_token.py"), str(path), str(listed), str(VOCAB_SIZE)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    return torch.tensor(json.loads(ended.stdout.splitlines()[-1])) if ended.returncode == 0 else None


def judge(name: str, python: Path, folder: Path) -> str | None:
    """Compare one model three ways and print a line; what is not as written here, or None."""
    kind, overrides = architectures.CASES[name]
    if kind == "gpt_neox":
        overrides = {
            "num_key_value_heads": 4,
            **overrides,
        }  # (the file says how many, and llama.cpp believes it)
    original = tiny(kind, **overrides)
    path = write_gguf(folder / "model.gguf", original)
    asked = prompts()
    expected = after(original, asked)
    ours = float((after(architectures.converted(path, folder / "converted"), asked) - expected).abs().max())
    found = by_llama_cpp(python, path, asked)
    theirs = None if found is None else float((found - expected).abs().max())
    bound = TABLE if kind.startswith(GELU) else CLOSE
    if ours > CLOSE:
        wrong: str | None = f"Pensieve differs from the original by {ours:.1e}"
    elif (theirs is None) != (name in NOT_LOADED):
        wrong = "llama.cpp " + ("does not load it" if theirs is None else "loads it")
    elif theirs is not None and (theirs > bound) != (name in DIFFERENT):
        wrong = f"llama.cpp differs from the original by {theirs:.1e}"
    else:
        wrong = None
    said = "not loaded" if theirs is None else f"{theirs:.1e}"
    print(
        f"{name:36} Pensieve {ours:.1e}  llama.cpp {said}  {wrong or DIFFERENT.get(name) or NOT_LOADED.get(name) or ''}",
        flush=True,
    )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", dest="words", default="", help="only models whose name holds this")
    parser.add_argument(
        "--venv",
        type=Path,
        default=HERE.parents[1] / ".llama-cpp",
        help="where llama.cpp is, or is to be, installed",
    )
    options = parser.parse_args()
    python = environment(options.venv)
    names = [name for name in architectures.CASES if options.words in name]
    wrong = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            wrong += [name] if judge(name, python, Path(folder)) else []
    print(json.dumps({"models": len(names), "wrong": wrong}))
    sys.exit(bool(wrong) or not names)


if __name__ == "__main__":
    main()
