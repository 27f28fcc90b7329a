"""Races: the same budget for every optimizer on one task, and what the results show."""
