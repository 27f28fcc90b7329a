"""Tasks made from a user's own files: tables, texts, arrays and images."""
