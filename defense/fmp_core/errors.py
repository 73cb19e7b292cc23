"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input. The message is one sentence: which file or flag, what is wrong, what to do.

    Command-line mains print it without a traceback and exit with code 2.
    """
