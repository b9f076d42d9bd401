"""Assertion helper of the contract tests."""


def expect(condition: object, message: str) -> None:
    """Raise an error with a message unless a condition holds.

    Raises:
        AssertionError: it does not hold. Unlike `assert` it is also raised under `python -O`.
    """
    if not condition:
        raise AssertionError(message)
