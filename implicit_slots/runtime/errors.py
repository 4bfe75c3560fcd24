"""The error for what a user can put right."""


class UserError(ValueError):
    """One clear sentence that says what to do; `main` prints it and exits with 1."""
