"""The model that ships with the package: its data, its training, and what it is worth."""
