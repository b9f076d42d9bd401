"""Text format of a reward model's input, stored in training and reused in scoring.

A model trained on responses with an end-of-sequence token or a system prompt gives other scores to texts without them. So
`rayrlhf reward` stores the format next to the weights.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rayrlhf.data.messages import Message
from rayrlhf.data.templates import conversation, last_user_text
from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_FILE = "reward_format.json"
"""File name, next to a reward model's weights."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Format of a prompt with its response.

    `data.train.template` is not included: it belongs to the data, and PPO prompts have their own.

    Attributes:
        chat: render both as turns of the chat template; otherwise concatenate plain text.
        system_prompt: first message of a conversation.
        end: end-of-sequence text after plain text; None for none.
        step_separator: text after each step, of a process reward model; None for an outcome reward model.
    """

    chat: bool = True
    system_prompt: str | None = None
    end: str | None = None
    step_separator: str | None = None

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase", prompt: str | list[Message], response: str) -> list[int]:
        """Tokenize prompt and response as in training, with exactly one end token.

        A conversation has all of its turns in the chat template, and its last user turn in plain text.
        """
        if self.chat:
            turns = [*conversation(prompt, self.system_prompt), {"role": "assistant", "content": response}]
            ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
            return ids
        text = f"{last_user_text(prompt)}{response}"
        if self.end is not None and not text.endswith(self.end):
            text += self.end
        return list(tokenizer(text)["input_ids"])

    def step_token_ids(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: str | list[Message], steps: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """Tokenize prompt and steps as in training.

        Returns the tokens, and the position of each step's last one.
        """
        if self.step_separator is None:
            raise ValueError("the format of an outcome reward model has no steps")
        if self.chat:
            turns = conversation(prompt, self.system_prompt)
            opening = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
            return step_tokens(tokenizer, opening["input_ids"], steps, self.step_separator)
        return step_tokens(tokenizer, plain_prompt_ids(tokenizer, last_user_text(prompt)), steps, self.step_separator)

    def write(self, folder: Path) -> None:
        """Store the format next to the weights in `folder`."""
        write_atomically(folder / FORMAT_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the format stored in `folder`; None if there is none.

        Raises:
            UserError: the file is invalid.
        """
        path = folder / FORMAT_FILE
        if not path.is_file():
            return None
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: expected the format that `rayrlhf reward` stores with the model: {error}") from error
        fits = isinstance(found.chat, bool) and all(
            isinstance(text, str | None) for text in (found.system_prompt, found.end, found.step_separator)
        )
        if not fits:
            raise UserError(f"{path}: expected chat true or false, and texts or null in system_prompt, end and step_separator")
        return found


def plain_prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Return the tokens of a prompt without a chat template, before steps."""
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def step_tokens(
    tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int], steps: Sequence[str], separator: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt with its steps, and the steps' last positions.

    Steps are tokenized one by one, so that no token spans two of them.
    """
    *parts, between = tokenizer([*steps, separator], add_special_tokens=False)["input_ids"]
    ids, ends = list(prompt_ids), []
    for part in parts:
        ids += [*part, *between]
        ends.append(len(ids) - 1)
    return ids, ends
