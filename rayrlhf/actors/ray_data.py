"""Ray Data's settings for the time of one pipeline, and its errors as what they were."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rayrlhf.errors import AlarmError, UserError


@contextmanager
def data_context(*, buffer_bytes: int, **settings: Any) -> Iterator[None]:
    """Set what a pipeline needs on Ray Data's context, which is the process's own, and put it back.

    Args:
        buffer_bytes: most memory of the object store that blocks between stages take.
        settings: further attributes of `ray.data.DataContext`.
    """
    import ray

    context = ray.data.DataContext.get_current()
    changed = {
        "enable_progress_bars": False,
        # Else an error arrives as text, and a user's mistake could not be told from a bug.
        "raise_original_map_exception": True,
    } | settings
    before = {name: getattr(context, name) for name in changed}
    resource_limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = resource_limits.copy(object_store_memory=buffer_bytes)
    with warnings.catch_warnings():
        # Ray Data has no other way yet to bound the restarts of its actors.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        # It would print the traceback of every error that is raised here anyway.
        logger = logging.getLogger("ray.data")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            for name, value in changed.items():
                setattr(context, name, value)
            yield
        finally:
            logger.setLevel(level)
            context.execution_options.resource_limits = resource_limits
            for name, value in before.items():
                setattr(context, name, value)


def raise_cause(error: Exception) -> NoReturn:
    """Raise the project's own error that a stage ended with, or the given one where there is none.

    Raises:
        UserError: a stage found a mistake of the user.
        AlarmError: a stage stopped itself.
    """
    from ray.exceptions import RayTaskError

    found: BaseException | None = error
    while found is not None:
        # Ray's error is an instance of the cause's class too, with the whole remote traceback as its text.
        if isinstance(found, UserError | AlarmError) and not isinstance(found, RayTaskError):
            # Ours are one line; Ray Data puts advice on retries behind it.
            raise type(found)(str(found).partition("\n")[0]) from None
        found = getattr(found, "cause", None) or found.__cause__
    raise error
