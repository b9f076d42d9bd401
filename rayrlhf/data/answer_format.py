"""How a reward model reads a prompt and a response: written down where it is trained, followed wherever it scores.

A model that learnt answers which end with an end-of-sequence token, or behind a system prompt, gives other scores to texts
without them. So `rayrlhf reward` stores the format beside the weights.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rayrlhf.data.templates import conversation
from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_FILE = "reward_format.json"
"""Beside a reward model's weights."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What stands around a prompt and its response.

    The text around a prompt alone (`data.train.template`) is not part of it: it belongs to the data, and PPO's
    prompts bring theirs.

    Attributes:
        chat: both are turns of the tokenizer's chat template; else they are plain text, one behind the other.
        system_prompt: first message of a conversation.
        end: the end-of-sequence text behind plain text; None where nothing follows.
    """

    chat: bool = True
    system_prompt: str | None = None
    end: str | None = None

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase", prompt: str, response: str) -> list[int]:
        """Return the tokens of prompt and response as in training; a response that brings its own end gets no second one."""
        if self.chat:
            turns = [*conversation(prompt, self.system_prompt), {"role": "assistant", "content": response}]
            ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
            return ids
        text = f"{prompt}{response}"
        if self.end is not None and not text.endswith(self.end):
            text += self.end
        return list(tokenizer(text)["input_ids"])

    def write(self, folder: Path) -> None:
        """Store it beside the weights in `folder`."""
        write_atomically(folder / FORMAT_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what is stored in `folder`; None where nothing is.

        Raises:
            UserError: it cannot be used.
        """
        path = folder / FORMAT_FILE
        if not path.is_file():
            return None
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: expected the format that `rayrlhf reward` stores beside the model: {error}") from error
        fits = isinstance(found.chat, bool) and all(isinstance(text, str | None) for text in (found.system_prompt, found.end))
        if not fits:
            raise UserError(f"{path}: expected chat true or false, and texts or null in system_prompt and end")
        return found
