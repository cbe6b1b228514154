"""How a step is run: tensors, attention, copies, sampling.

Only this room and `text` import torch and transformers.
"""
