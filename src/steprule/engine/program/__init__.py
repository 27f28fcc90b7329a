"""The program of a step: traced, with its sums, and the order in which its parts run."""
