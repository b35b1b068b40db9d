"""Partial generations: stored in Redis so that the next attempt resumes them."""
