"""The solver core in models of your own."""
