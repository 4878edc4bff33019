"""What the command line does besides training: run, info, bench, preflight, checkpoint, plan."""
