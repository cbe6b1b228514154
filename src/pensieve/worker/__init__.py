"""How a step is done: tensors, attention, copies, sampling.

The only room, with `text`, that imports torch and transformers.
"""
