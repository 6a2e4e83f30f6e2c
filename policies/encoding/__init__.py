"""Observations as tensors, prompts as words and actions as tokens: what every network reads."""
