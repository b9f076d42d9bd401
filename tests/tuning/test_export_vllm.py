"""vLLM loads what SFT exports, unchanged, and gives its tokens the log-probs that transformers gives them."""

import pytest

from rayrlhf.tuning.train_model import train_sft
from tests.tuning.runs import sft_config

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("cluster")]


def test_vllm_answers_with_the_exported_model_as_transformers_does(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rayrlhf.config.model import ModelSection
    from rayrlhf.config.rollout import RolloutSection
    from rayrlhf.data.records import RolloutRequest, SampleKey
    from rayrlhf.engines.rollout.common import RolloutSpec
    from rayrlhf.engines.rollout.factory import build_rollout_engine

    result = train_sft(sft_config(tmp_path, "train.steps=4", "evaluation.generations=0", "checkpoint.every=0"))
    model = AutoModelForCausalLM.from_pretrained(result.export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(result.export)
    turns = [{"role": "user", "content": "say 3 twice"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="np", return_dict=True)[
        "input_ids"
    ]
    section = ModelSection(path=str(result.export), dtype="float32")
    engine = build_rollout_engine(RolloutSpec(section, RolloutSection(memory_gib=0.25, max_model_length=64), 0))
    engine.submit([RolloutRequest(SampleKey(0, 0, 0), prompt[0], 0)], temperature=0.0, max_new_tokens=8)
    (answer,) = engine.poll(1)
    engine.close()
    ids = torch.tensor([[*prompt[0].tolist(), *answer.response_ids.tolist()]])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)[len(prompt[0]) - 1 :]
    assert answer.response_ids.tolist() == logprobs.argmax(-1).tolist()
