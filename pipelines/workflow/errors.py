"""The one exception for a user's mistakes."""


class UserError(Exception):
    """Something the user can mend. The message is one line that names the thing and the remedy; exit code 2."""
