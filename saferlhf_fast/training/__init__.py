"""The stages that train: sft, preference (reward and cost), dpo, ppo_lag; and their loop and losses."""
