"""Evaluation tasks, baselines and the report."""
