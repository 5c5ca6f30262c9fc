"""Architectures behind one seam (`arch.py`); runs without Ray and DeepSpeed."""
