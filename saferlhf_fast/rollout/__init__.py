"""Responses of the current policy with the scores of frozen models: one batch of experience."""
