"""Workflows: what an episode does with a prompt."""
