"""Parameters that are sharded over processes: what is here, what is exchanged, who owns a matrix."""
