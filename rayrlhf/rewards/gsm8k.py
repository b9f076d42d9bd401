"""The final-answer check of GSM8K (Cobbe et al. 2021): right number or not."""

from decimal import Decimal

from rayrlhf.errors import UserError
from rayrlhf.rewards.numbers import final_number


def gsm8k(responses: list[str], answer: list[str | int | float]) -> list[float]:
    """Return 1.0 for each response whose final number equals the reference's, else 0.0.

    Args:
        responses: [B]. What counts as the final number: `rayrlhf.rewards.numbers.final_number`.
        answer: [B], the dataset's column: a worked solution that ends in `#### N`, or the number itself.

    Raises:
        UserError: a reference answer has no number in it.
    """
    expected = [reference_number(index, value) for index, value in enumerate(answer)]
    return [float(final_number(response) == number) for response, number in zip(responses, expected, strict=True)]


def reference_number(index: int, answer: str | int | float) -> Decimal:
    """Read the number out of a dataset's answer.

    Raises:
        UserError: there is none; names the sample.
    """
    number = final_number(str(answer))
    if number is None:
        raise UserError(f"column 'answer' of sample {index} has no number: {str(answer)[:60]!r}; expected '#### N' or a number")
    return number
