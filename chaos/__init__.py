"""Faults on purpose: programs that break a real fleet and judge whether it kept its promises.

Not shipped. From a checkout: ``python -m chaos run | faults | mutants``; see docs/reliability.md.
"""
