"""What stands in a response's last block of three backticks."""

from typing import Literal

from rayrlhf.errors import UserError

Where = Literal["whole", "fenced"]
"""The whole response, or the inside of its last closed block of three backticks."""
WHERES = ("whole", "fenced")


def check_where(name: str, where: str) -> None:
    """Check an argument of type `Where`.

    Args:
        name: the reward function's, for the message.
        where: the argument.

    Raises:
        UserError: it is something else.
    """
    if where not in WHERES:
        raise UserError(f"reward function {name!r}: where {where!r}: expected 'whole' or 'fenced'")


def last_block(response: str, languages: tuple[str, ...] = ()) -> str:
    """Return the inside of the last closed block, without a language named at its head; empty when there is none."""
    pieces = response.split("```")
    if len(pieces) < 3:
        return ""
    inside = pieces[(len(pieces) - 1) // 2 * 2 - 1]
    for language in languages:
        if inside.startswith(language):
            return inside.removeprefix(language)
    return inside
