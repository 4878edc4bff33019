"""`saferlhf-fast checkpoint`: looks at a run's checkpoints, converts them, exports their models."""
