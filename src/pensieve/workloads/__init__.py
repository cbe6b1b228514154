"""What users ask and when: conversations, arrivals, think times. Knows text and seconds; never tokens of a
model, or an engine.
"""
