"""Terminal chat with the exported model of a run."""

from pathlib import Path

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
        UserError: there is no exported model.
    """
    from transformers import TextStreamer

    from rayrlhf.models.load import load_causal_model, load_tokenizer

    section = ModelSection(path=str(find_model(run)))
    model: PreTrainedModel = load_causal_model(section)
    tokenizer = load_tokenizer(section)
    system = system_prompt(run)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def answer(text: str) -> None:
        turns = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)

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
    for folder in (run / "export", run):
        if (folder / "model.safetensors").is_file() or any(folder.glob("model-*.safetensors")):
            return folder
    raise UserError(f"{run}: no exported model, expected {run / 'export'} (written when a run ends) or a Hugging Face folder")


def system_prompt(run: Path) -> str | None:
    """Return the system prompt that the run trained with."""
    config = run / "config.yaml"
    if not config.is_file():
        return None
    prompt = (read_note(config).get("data") or {}).get("system_prompt")
    return None if prompt is None else str(prompt)


def _read_line() -> str:
    """Read one line; the end of the input counts as an empty one."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
