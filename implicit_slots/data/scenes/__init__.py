"""CLEVR-like scenes, rendered by JAX."""
