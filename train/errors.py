"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in usage, configuration or data: shown as one sentence, exit code 2."""
