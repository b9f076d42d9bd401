"""Errors for users: a `UserError` is one clear line and exit code 2.

Any other exception that escapes is a bug.
"""


class UserError(Exception):
    """An error in the user's input: place, reason, expected and nearest valid value."""


class ErrorList:
    """Collects errors of rows, to raise them as one report."""

    def __init__(self, limit: int = 20) -> None:
        """Create an empty list that is raised when it has `limit` errors."""
        self._limit = limit
        self._errors: list[UserError] = []

    def add(self, error: UserError) -> None:
        """Append an error.

        Raises:
            UserError: it is the last one that fits.
        """
        self._errors.append(error)
        if len(self._errors) == self._limit:
            self.raise_any()

    def raise_any(self) -> None:
        """Raise the errors, one line each, if there are any.

        Raises:
            UserError: the report; a single error is raised as it is.
        """
        if not self._errors:
            return
        if len(self._errors) == 1:
            raise self._errors[0]
        lines = [str(error) for error in self._errors]
        if len(lines) == self._limit:
            lines.append(f"These are the first {self._limit} errors; later rows were not read.")
        raise UserError("\n".join(lines)) from self._errors[0]


class DeviceMemoryError(UserError):
    """Lack of memory on a device; names the process and the settings to change."""


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
