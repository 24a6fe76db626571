"""Proofs: pictures that show what a model has learnt, a file for each system."""
