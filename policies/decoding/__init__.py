"""Tokens after a prefix: its keys and values, and the loops that choose an action's tokens."""
