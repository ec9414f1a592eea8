"""The one exception that is meant for the user."""


class UserError(Exception):
    """One sentence for the user: what was found, where, and what to do.

    Commands print it without a traceback and exit with code 2."""

    def __init__(self, text: str, anywhere: bool = False) -> None:
        """anywhere  the error may occur on one rank alone, so every rank that raises it prints it;
        otherwise all ranks find the same error, and rank 0 prints it for all."""
        super().__init__(text)
        self.anywhere = anywhere
