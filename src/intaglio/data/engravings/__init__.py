"""Engravings made from numbers: an unlimited corpus whose every fact is known."""

from intaglio.data.engravings.corpus import Engravings

__all__ = ["Engravings"]
