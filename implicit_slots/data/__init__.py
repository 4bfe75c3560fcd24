"""Where batches come from: the embedded scenes and files on disk."""
