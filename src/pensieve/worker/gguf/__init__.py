"""GGUF files: what they hold (`file`), what that means to transformers (`architectures`, `rope`), whether
nothing is missing or left over (`plan`), and the same model as safetensors (`write`). Knows nothing of
caches, downloads or the command line.
"""
