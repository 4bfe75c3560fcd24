"""Errors for what a user can put right; everything else is ours, with a traceback."""


class UserError(Exception):
    """One clear sentence that says what to do; `main` prints it and exits with 1.

    It is no ValueError, so that no error of ours passes for one.
    """


class InvalidValue(UserError, ValueError):
    """An argument of a constructor that is not one of the possible ones.

    Who builds a model in a program of their own catches it as the ValueError it is.
    """
