"""Pensieve: stateful serving of large language models. Conversations keep their KV cache between turns."""

__version__ = "0.1.0"
