"""Proof that an implementation computes what the official one does: one file a family of golden fixtures."""
