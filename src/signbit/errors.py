"""The one exception that means "the input or the machine, not signbit, is at fault"."""

from __future__ import annotations


class SignbitError(Exception):
    """Bad input, or an environment that cannot do what was asked.

    The message is one line: what is wrong, what was expected, what to do. The command line prints it and exits with
    status 2; anything else that escapes is a bug in signbit and exits with status 1.
    """
