"""What a checkpoint holds, which of it is whose, and what loading did."""
