"""The process that compares mathematical answers, so that an answer that computes for ever can be ended from outside.

Run as a module. It reads lines of JSON `{"answer": text, "response": text}` from standard input and writes one line for each:
`true`, `false`, or `null` when there is no expression in the reference answer. It ends with its input.
"""

import json
import logging
import re
import resource
import sys

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[|(?<!\\)\b[A-Za-z]{3}")
"""A text that says by itself where its expression is, or that has words in it and is no expression as a whole."""
MEMORY_BYTES = 4 * 2**30
"""Address space; a huge power ends as an error here instead of filling the node."""


def is_right(answer: str, response: str) -> bool | None:
    r"""Whether the response's last expression equals the answer's; None when the answer has none.

    The reference is an expression as it is (`42`, `1/2`), LaTeX (with or without dollar signs), or a worked solution that ends
    in `\boxed{...}`.
    """
    from math_verify import parse, verify

    # Its own timers are signals, which a long multiplication does not notice; the process on the other side keeps the time.
    forms = [answer, f"${answer}$"] if _MARKED.search(answer) else [f"${answer}$", answer]
    gold = next((found for form in forms if (found := parse(form, parsing_timeout=0))), None)
    if not gold:
        return None
    return bool(verify(gold, parse(response, parsing_timeout=0), timeout_seconds=0))


def main() -> None:
    """Answer line by line."""
    logging.disable()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    bound = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            verdict = is_right(asked["answer"], asked["response"])
        except (MemoryError, RecursionError, OverflowError):
            verdict = False
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
