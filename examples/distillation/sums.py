"""A reward for numbers written as a sum."""


def adds_up(responses: list[str], answer: list[str]) -> list[float]:
    """Score 1.0 for two positive numbers whose sum is the answer, such as `9+528`, else 0.0."""
    return [float(_is_sum(text.split("+"), int(number))) for text, number in zip(responses, answer, strict=True)]


def _is_sum(terms: list[str], number: int) -> bool:
    positive = all(term.isdecimal() and int(term) > 0 for term in terms)
    return len(terms) == 2 and positive and sum(map(int, terms)) == number
