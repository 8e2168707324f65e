"""Weights in and out, quantization, and the embedded model."""
