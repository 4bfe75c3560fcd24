"""One family of metrics a file; arrays in, numbers out."""
