"""Ray Data's settings during one pipeline, and its errors as the original ones."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rayrlhf.errors import AlarmError, UserError


@contextmanager
def data_context(*, buffer_bytes: int, **settings: object) -> Iterator[None]:
    """Change this process's Ray Data context for the block.

    Args:
        buffer_bytes: maximum object-store memory of the blocks between stages.
        settings: further attributes of `ray.data.DataContext`.
    """
    import ray

    context = ray.data.DataContext.get_current()
    changed = {
        "enable_progress_bars": False,
        # Otherwise an error arrives as text, and a user's mistake looks like a bug.
        "raise_original_map_exception": True,
    } | settings
    before = {name: getattr(context, name) for name in changed}
    resource_limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = resource_limits.copy(object_store_memory=buffer_bytes)
    with warnings.catch_warnings():
        # Ray Data has no other way yet to bound the restarts of its actors.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        # Ray Data would print the traceback of every error that is raised here anyway.
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
    """Raise the project's own error behind a stage's error, or the given one.

    Raises:
        UserError: a stage found a user's mistake.
        AlarmError: a stage stopped itself.
    """
    from ray.exceptions import RayTaskError

    found: BaseException | None = error
    while found is not None:
        # Ray's error is an instance of the cause's class too, with the whole remote traceback as its text.
        if isinstance(found, UserError | AlarmError) and not isinstance(found, RayTaskError):
            # Our errors are one line; Ray Data appends advice on retries.
            raise type(found)(str(found).partition("\n")[0]) from None
        found = getattr(found, "cause", None) or found.__cause__
    raise error
