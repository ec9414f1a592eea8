"""The one exception that is for the user."""


class UserError(Exception):
    """One sentence for the user: what was found, where, and what to do.  Commands print it and exit
    with 2."""

    def __init__(self, text: str, anywhere: bool = False):
        """anywhere: every rank that raises it says so, for one alone may know; else rank 0 does,
        for all find the same."""
        super().__init__(text)
        self.anywhere = anywhere
