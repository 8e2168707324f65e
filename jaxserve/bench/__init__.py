"""How fast: a load for a server, and a model's phases beside what the machine could do."""
