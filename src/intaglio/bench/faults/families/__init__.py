"""Programs with their faults, one a file; see docs/faults.md for how to add one."""
