"""`saferlhf-fast checkpoint`: inspects a run's checkpoints, converts them, exports their models."""
