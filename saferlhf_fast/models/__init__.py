"""Models and their files: causal LM, score model and policy, with packing, attention and adapters."""
