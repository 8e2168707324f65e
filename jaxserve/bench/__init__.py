"""A load for an OpenAI-compatible server: what it asks, how it is put, what is made of the answers."""
