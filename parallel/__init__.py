"""Meshes, shardings, the expert exchange, placement and transfer."""
