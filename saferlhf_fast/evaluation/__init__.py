"""How good and how safe a policy is: figures on held-out prompts with their uncertainty, and the page that
shows a run.
"""
