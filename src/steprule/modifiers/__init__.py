"""Habits that any rule can wear."""
