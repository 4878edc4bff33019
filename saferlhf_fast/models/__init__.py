"""The models and what a forward pass takes: causal language model, score model, policy, attention over packed
rows, adapters, files.
"""
