"""The one exception that users see."""


class IntarsiaError(ValueError):
    """A sentence for a person: what was given, what is possible, what to do.

    The command line prints the message alone and exits with status 2; a traceback means a defect of ours.
    """
