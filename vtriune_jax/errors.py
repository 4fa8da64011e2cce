"""The one error a user is meant to read: what was wrong, what was expected, how to mend it."""


class UserError(ValueError):
    """A mistake in the input (config, data, checkpoint, environment), not in the program.

    `main` prints its text as a single line and exits with status 2; any other exception keeps its
    traceback. The text names the thing, the value found and the remedy.
    """
