"""Measuring: drives systems that answer chats, compares what they said and how fast, and writes it down."""
