"""A network's tensors, whoever's network: out and in, under an adapter, merged, from published files."""
