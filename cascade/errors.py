"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input, said in one sentence: what was wrong, what was expected, what to do.

    The command line prints the sentence and exits with code 2; Python callers may catch it.
    """
