"""Rules on whole matrices."""
