"""Rewards: user functions run outside the event loop, in processes that can be killed."""
