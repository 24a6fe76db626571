"""Instruments: pure functions from tensors to readings beside their nulls, or to why there is none."""
