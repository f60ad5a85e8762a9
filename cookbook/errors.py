"""The one exception for mistakes of the person at the keyboard: printed as a single line, exit status 2, no traceback."""


class UsageError(Exception):
    """What came, what was expected, what to do; one line."""
