"""Rules that treat every element of a tensor on its own."""
