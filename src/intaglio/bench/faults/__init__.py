"""Are our verdicts right? Trainings into which a fault was put, and healthy ones: ``intaglio bench faults``."""
