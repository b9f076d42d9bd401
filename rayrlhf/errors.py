"""Errors for users: a `UserError` is one clear line and exit code 2.

Any other exception that escapes is a bug.
"""


class UserError(Exception):
    """An error in the user's input: what, where, expected value, nearest valid value."""


class DeadlineError(Exception):
    """A wait exceeded its deadline; names the call, the actor and the start."""


class AlarmError(Exception):
    """A run that stopped itself because a measured quantity left its allowed range."""


class ActorLostError(Exception):
    """The process of a call died; names the actor and the call.

    Attributes:
        actor: name of the lost actor, `<run>/<role>/<rank>`; empty if it is ambiguous.
    """

    def __init__(self, message: str, actor: str = "") -> None:
        super().__init__(message)
        self.actor = actor


class StoppedError(Exception):
    """A run stopped by a signal at a step's end; the same command resumes it."""
