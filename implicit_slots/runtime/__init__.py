"""What every other room stands on and no model knows."""
