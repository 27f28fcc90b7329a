"""Rules that look at a whole matrix."""
