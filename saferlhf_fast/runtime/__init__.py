"""The foundation of a run: processes, DeepSpeed, the run's folder, checkpoints, metrics, terminal output."""
