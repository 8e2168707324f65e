"""Serve large mixture-of-experts language models with JAX."""

__all__: list[str] = []
