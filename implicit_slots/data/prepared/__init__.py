"""Data sets at the training resolution, kept on disk."""
