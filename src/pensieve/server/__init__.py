"""The HTTP side of Pensieve: the API, and the page that shows conversations and where their KV cache lies."""
