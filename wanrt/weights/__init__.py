"""Find, pull, check, convert, slice and load checkpoints."""
