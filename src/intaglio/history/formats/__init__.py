"""Readers of everybody's histories, a module a family of formats: each has ``claims(path)`` and ``read(path)``."""
