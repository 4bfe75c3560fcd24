"""Configurations: base.py declares every key once, each other file is a claim."""
