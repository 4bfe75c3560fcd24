"""Arrays and numbers to pictures, for the screen and for papers."""
