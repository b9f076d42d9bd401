"""Terminal chat with the exported model of a run."""

import sys
from pathlib import Path
from typing import Any

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel
from rayrlhf.storage.notes import read_note


def chat_with(run: Path, prompt: str | None, *, max_new_tokens: int, temperature: float) -> None:
    """Answer one prompt, or each typed line until an empty one.

    Args:
        run: a run folder (its `export/` and system prompt are used), or a Hugging Face model folder.
        prompt: the prompt; None reads lines from the terminal.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.

    Raises:
        UserError: there is no exported model, it has no chat template, or no embedding of a token that the template writes.
    """
    from transformers import TextStreamer

    from rayrlhf.data.templates import conversation, require_chat_template
    from rayrlhf.models.load import load_causal_model, load_tokenizer
    from rayrlhf.models.rounding import share_line
    from rayrlhf.models.start_check import check_tokens

    folder, config = find_model(run), _config(run)
    if line := share_line(folder):
        print(f"{folder}: {line}", file=sys.stderr)  # noqa: T201 - a line of the terminal chat
    trust = bool((config.get("model") or {}).get("trust_remote_code", False))
    section = ModelSection(path=str(folder), trust_remote_code=trust, attention="eager")  # every architecture has it
    tokenizer, data = load_tokenizer(section), config.get("data") or {}
    plain = data.get("chat") is False
    if not plain:
        require_chat_template(tokenizer)
    model: PreTrainedModel = load_causal_model(section)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def answer(text: str) -> None:
        if plain:  # as the run's prompts
            inputs = tokenizer(text, return_tensors="pt")
        else:
            turns = conversation(text, data.get("system_prompt"))
            inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        check_tokens(section, tokenizer, inputs["input_ids"].numpy())
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        (ids,) = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        if not tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip():
            print("(an empty answer: the model ended it without text)")  # noqa: T201 - the command's own output

    if prompt is not None:
        answer(prompt)
        return
    while text := _read_line():
        answer(text)


def find_model(run: Path) -> Path:
    """Return the exported model of a run folder, or the folder itself.

    Raises:
        UserError: neither holds a model.
    """
    from rayrlhf.models.model_files import has_weights
    from rayrlhf.models.model_path import EXPORT, fresh_merge

    for folder in (*fresh_merge(run), run / EXPORT, run):
        if folder.is_dir() and has_weights(folder):
            return folder
    raise UserError(f"{run}: no exported model, expected {run / 'export'} (written when a run ends) or a Hugging Face folder")


def _config(run: Path) -> dict[str, Any]:
    """Return the configuration that the run trained with; empty for a model folder."""
    config = run / "config.yaml"
    return read_note(config) if config.is_file() else {}


def _read_line() -> str:
    """Read one line; the end of the input counts as an empty one."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
