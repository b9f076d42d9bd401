"""Text format of a reward model's input, stored in training and reused in scoring.

A model that was trained on responses with an end-of-sequence token or a system prompt scores texts without them differently.
So `rayrlhf reward` stores the format next to the weights.
"""

import json
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
    """

    chat: bool = True
    system_prompt: str | None = None
    end: str | None = None

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
        fits = isinstance(found.chat, bool) and all(isinstance(text, str | None) for text in (found.system_prompt, found.end))
        if not fits:
            raise UserError(f"{path}: expected chat true or false, and texts or null in system_prompt and end")
        return found
