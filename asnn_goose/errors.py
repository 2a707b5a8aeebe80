"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake in the input or the surroundings, told in one sentence.

    The command line prints the sentence on stderr and leaves with status 2; a traceback is shown with ``--debug`` only.
    The sentence names the key or file, the value found there, and the way out.
    """
