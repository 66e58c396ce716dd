"""wan-tiny, the embedded model: its world, its trainers and its weights."""
