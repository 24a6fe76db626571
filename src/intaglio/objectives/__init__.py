"""Losses as pure functions, and the term that a system hands to its trainer."""

from intaglio.objectives.terms import Term

__all__ = ["Term"]
