"""Cells: genes and counts, where they are read from and in which order. Knows nothing of tokens or models."""
