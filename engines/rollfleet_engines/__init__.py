"""Clients of inference servers: generation, chat, control and load signals.

Used by the worker and by the trainer; imports :mod:`rollfleet_common` only, and never torch.
"""
