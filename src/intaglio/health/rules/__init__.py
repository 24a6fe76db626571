"""Rules: small pure functions from readings or configurations to findings, with their limits beside them."""
