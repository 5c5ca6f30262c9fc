"""Evaluation: one file a task, one line in `run.TASKS`; baselines on the same cells; a verdict."""
