"""What a run stands on: processes and the engine, its folder and checkpoints, and what it tells while it goes
on.
"""
