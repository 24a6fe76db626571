"""Networks with their use."""
