"""The model as pure functions over arrays."""
