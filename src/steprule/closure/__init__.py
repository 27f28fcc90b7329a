"""Rules that call the loss again."""
