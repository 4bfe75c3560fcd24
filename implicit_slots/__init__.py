"""Slot attention trained by implicit differentiation."""
