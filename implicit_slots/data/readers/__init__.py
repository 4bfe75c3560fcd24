"""Files and their formats, to arrays."""
