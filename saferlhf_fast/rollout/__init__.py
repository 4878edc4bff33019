"""Responses of the current policy and what frozen models say of them: one batch of experience."""
