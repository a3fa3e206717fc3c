"""What came out of a run, as data and as tables."""
