"""What a model's response must not be before it may replace a person's: empty, cut off, looping, or refused by the verifier."""

from typing import Literal

Refusal = Literal["empty", "cut off", "looping", "fails the verifier"]
LOOP_CHARACTERS = 32
"""Shorter repeats are ordinary text (`ha ha ha`, `1000000`)."""
LONGEST_PERIOD = 512


def refusal(
    response: str, finish_reason: str, *, loop_repeats: int, verifier_score: float | None, verifier_minimum: float
) -> Refusal | None:
    """Return why a response is refused, or None.

    Args:
        response: the text.
        finish_reason: "stop" or "length".
        loop_repeats: repeats at the end that make a loop.
        verifier_score: the verifier's score; None where there is no verifier.
        verifier_minimum: least score that passes.
    """
    if not response.strip():
        return "empty"
    if is_looping(response, loop_repeats):
        return "looping"
    if finish_reason == "length":
        return "cut off"
    if verifier_score is not None and not verifier_score >= verifier_minimum:
        return "fails the verifier"
    return None


def is_looping(text: str, repeats: int) -> bool:
    """Whether the text ends in at least `repeats` copies of one piece that together have `LOOP_CHARACTERS` or more.

    The last copy may be cut anywhere, since a loop usually ends where the tokens ran out.
    """
    text = text.rstrip()
    # Sentences repeat with the space between them, which the last one lacks.
    return any(_ends_in_copies(variant, repeats) for variant in (text, f"{text} "))


def _ends_in_copies(text: str, repeats: int) -> bool:
    for period in range(1, min(LONGEST_PERIOD, len(text) // repeats) + 1):
        length = max(period * repeats, LOOP_CHARACTERS)
        if length <= len(text) and text[-length:-period] == text[-length + period :]:
            return True
    return False
