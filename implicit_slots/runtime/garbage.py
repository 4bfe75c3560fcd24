"""When Python looks for garbage: objects that refer to one another and to nothing else.

A search goes through all objects that there are. What is imported and traced until the
first step stays, some hundred thousand objects: searches would find next to nothing and
take a quarter of the CPU time until then.
"""

import gc

_left_out = False


def leave_out() -> None:
    """Python does not look for garbage until `look_for_it`, in every thread."""
    global _left_out
    if gc.isenabled():
        _left_out = True
        gc.disable()


def look_for_it() -> None:
    """Ends what `leave_out` began: searches go through what is made from now on.

    Does nothing where that was not called.
    """
    global _left_out
    if _left_out:
        _left_out = False
        gc.freeze()
        gc.enable()
