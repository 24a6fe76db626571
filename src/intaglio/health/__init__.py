"""Instruments, rules, findings: what a run's numbers allow to be said."""
