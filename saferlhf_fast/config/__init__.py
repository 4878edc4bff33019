"""The settings of recipes: their sections and stages, how they are read and checked, and their hashes.

Nothing here imports torch.
"""
