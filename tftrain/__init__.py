"""Pretrain, fine-tune and evaluate TranscriptFormer-class cell models on a Ray cluster."""

__version__ = "0.1.0"
