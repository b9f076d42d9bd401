"""Worker process that compares mathematical answers.

The parent can kill it when a comparison never ends. Run as a module, it reads lines of JSON
`{"answer": text, "response": text}` from standard input. It writes one line for each: `true`, `false`, or `null` when the
reference answer has no expression. It ends with its input.
"""

import json
import logging
import re
import resource
import sys

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[|(?<!\\)\b[A-Za-z]{3}")
"""Text with a marked expression, or with words, so that the whole is no expression."""
MEMORY_BYTES = 4 * 2**30
"""Address space limit: a huge power raises an error instead of filling the node's memory."""


def is_right(answer: str, response: str) -> bool | None:
    r"""Return True if the last expressions are equal; None when the answer has none.

    The reference is an expression as it is (`42`, `1/2`), LaTeX (with or without dollar signs), or a worked solution that ends
    in `\boxed{...}`.
    """
    from math_verify import parse, verify

    # Its own timers are signals, which a long multiplication does not check; the parent process enforces the limit.
    forms = [answer, f"${answer}$"] if _MARKED.search(answer) else [f"${answer}$", answer]
    gold = next((found for form in forms if (found := parse(form, parsing_timeout=0))), None)
    if not gold:
        return None
    return bool(verify(gold, parse(response, parsing_timeout=0), timeout_seconds=0))


def main() -> None:
    """Compare line by line."""
    logging.disable()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    bound = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    for line in sys.stdin:
        pair = json.loads(line)
        try:
            verdict = is_right(pair["answer"], pair["response"])
        except (MemoryError, RecursionError, OverflowError):
            verdict = False
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
