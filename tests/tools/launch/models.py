"""Model folders with nothing but a configuration: what a plan reads of a model."""

import json

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
QWEN_32B = {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
}


def write_model(folder, sizes):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(settings | sizes))
    return folder


def ppo(model, *overrides):
    base = [
        f"model.path={model}",
        "reward.functions=[{name: length}]",
        "data.train.path=prompts.jsonl",
        "data.max_prompt_tokens=256",
        "rollout.prompts_per_step=256",
    ]
    return load_config(PPOConfig, None, [*base, *overrides])
