"""The parts of a PPO-Lag step: roles, prompts, advantage, multiplier, loss, update, selection, metrics."""
