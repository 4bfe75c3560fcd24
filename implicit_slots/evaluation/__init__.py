"""What one wants to know of a trained model, as numbers."""
