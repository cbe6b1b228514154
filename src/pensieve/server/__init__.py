"""Conversations over HTTP: OpenAI's API, our own, a page to watch.

Knows HTTP and the conversation service; never engines' insides, tensors or SQL.
"""
