"""The one kind of error that is the user's to mend, and what is none: being asked to stop."""


class UserError(Exception):
    """Bad input, said in one sentence: what was wrong, what was expected, what to do.

    The command line prints the sentence and exits with code 2; Python callers may catch it.
    """


class Stopped(Exception):
    """A job was asked to stop (SIGTERM) and saved what it had done: exit code 0.

    The sentence says what was saved, and how to go on.
    """
