"""The stages that train: sft, preference (reward and cost), dpo, ppo_lag, and the loop and losses that they
share.
"""
