"""Noise schedules, samplers, guidance, and decoding of token models."""
