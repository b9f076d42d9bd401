"""The errors a user sees. A `UserError` is one clear line and exit code 2; anything else that escapes is a bug."""


class UserError(Exception):
    """A mistake in the user's input: what, where, what was expected, and the nearest valid thing."""


class DeadlineError(Exception):
    """A wait that overran: names what was waited for, on whom, and since when."""


class AlarmError(Exception):
    """A run that stopped itself because a measured quantity left its allowed range."""


class ActorLostError(Exception):
    """A process that served a call is gone: names the actor and the call.

    Attributes:
        actor: name of the lost actor, `<run>/<role>/<rank>`; empty where several could be meant.
    """

    def __init__(self, message: str, actor: str = "") -> None:
        super().__init__(message)
        self.actor = actor


class StoppedError(Exception):
    """A run that was asked to stop (SIGTERM, Ctrl-C) and did so at a step's end; the same command resumes it."""
