"""A reward in five lines: the share of a response's characters that are digits."""


def digits(responses: list[str]) -> list[float]:
    """Score each response with the share of its characters that are digits, 0 to 1."""
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in responses]
