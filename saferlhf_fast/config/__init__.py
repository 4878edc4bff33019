"""What a recipe may say: its sections and stages, how it is read and checked, and what it is known by.

Nothing here imports torch.
"""
