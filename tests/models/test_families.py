"""Every family goes from load to export with the model's own log-probs, or is refused before anything runs.

All but `QUICK` are `slow`, 2 s each. vLLM samples from `VLLM_SLOW` in the slow tests, 6 s each; the others are `nightly`.
`python -m tests.models.test_families [--vllm] [FAMILY...]` writes what it found to `tests/models/families.json`, from which
`docs/generate.py` makes the page on model families.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import RolloutRequest, SampleKey, TokenSequence
from rayrlhf.engines.rollout.common import RolloutSpec, trained_context
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine
from rayrlhf.engines.rollout.vllm import VLLMRolloutEngine
from rayrlhf.engines.scoring.frozen import score_sequences
from rayrlhf.engines.train.collate import collate
from rayrlhf.errors import UserError
from rayrlhf.models.adapter_folder import adapter_parameters, merge_adapters, save_adapters
from rayrlhf.models.export import check_reward_model, save_network
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.models.lora import checkpoint_tensors
from rayrlhf.models.network import build_network
from tests.models.families import KINDS, write_family

TABLE = Path(__file__).with_name("families.json")
QUICK = ("llama", "gemma2", "granite", "falcon_alibi", "glm4_moe", "lfm2", "phi3_longrope", "opt")
VLLM_SLOW = ("gpt2", "gemma2", "granite", "falcon_alibi", "glm4_moe")
CPU = torch.device("cpu")
LM, VALUE, LOGPROBS = frozenset({"lm"}), frozenset({"value"}), frozenset({"logprobs"})
RANDOM = np.random.default_rng(5)
SAMPLES = [TokenSequence(RANDOM.integers(3, 259, length).astype(np.int32), 5) for length in (20, 41, 9)]


def close(found, wanted):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=2e-5, atol=2e-5)


@torch.no_grad()
def own(model):
    found = []
    for sample in SAMPLES:
        ids = torch.from_numpy(sample.token_ids).long()
        found.append(
            model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)[4:-1].gather(-1, ids[5:, None])[:, 0]
        )
    return torch.cat(found)


def ours(network, *, packed=False):
    batch = collate(SAMPLES, 60, CPU, packed=packed)
    return network(batch.input_ids, batch.positions, LOGPROBS).logprobs


def scored(network):
    scores = score_sequences(network, SAMPLES, LOGPROBS, temperature=1.0, token_budget=4096, device=CPU)
    return np.concatenate([score.logprobs for score in scores])


def outcome(stage, *arguments):
    """What a stage found, or its refusal; anything else fails the test."""
    try:
        return stage(*arguments)
    except UserError as error:
        return f"refused: {str(error).partition(': ')[2] or error}"


def loaded(folder):
    """Load with SDPA, or as the refusal says with eager attention."""
    section = ModelSection(path=str(folder), dtype="float32")
    try:
        build_network(section, LM, "zero", 0)
    except UserError as error:
        if "expected model.attention: eager" not in str(error):
            raise
        return section.model_copy(update={"attention": "eager"})
    return section


def scoring(section):
    """PPO scoring, padded and packed."""
    network = build_network(section, LM, "zero", 0)
    wanted = own(network.model)
    close(scored(network), wanted)
    network.accept_packed_rows()
    for packed in (False, True):
        with torch.no_grad():
            close(ours(network, packed=packed), wanted)
    logits = network.check.logits
    parts = [] if logits.scale == 1 else ["scaled"]
    parts += [] if logits.cap is None else ["capped"]
    rows = {"packed": "packed", "padded": "padded", "alone": "one by one"}[network.check.layout]
    return {
        "logits": ", ".join(parts) or "plain",
        "rows": rows if network.check.longest_together is None else f"{rows}, long ones alone",
    }


def training(section):
    """An SFT step with recomputed activations changes the weights as one without does."""
    grads = []
    for checkpointing in (False, True):
        network = build_network(section.model_copy(update={"gradient_checkpointing": checkpointing}), LM, "zero", 0)
        network.train(checkpointing)
        (-ours(network).mean()).backward()
        grads.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        assert len(grads[-1]) > 3
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5)
    return "yes"


def adapters(section, folder):
    """Adapters start as nothing, all learn, and the merged checkpoints, of PPO and of their folder, have what they learnt."""
    lora = section.model_copy(update={"lora": LoraSection(rank=2, alpha=4)})
    network = build_network(lora, LM, "zero", 0)
    close(scored(network), own(build_network(section, LM, "zero", 0).model))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    wanted = own(network.model)
    ours(network).sum().backward()
    silent = [name for name, p in trained.items() if p.grad is None]
    plain = build_network(section, LM, "zero", 0)
    state = {tensor.name: tensor.value() for tensor in checkpoint_tensors(network.model)}
    assert state.keys() == {tensor.name for tensor in checkpoint_tensors(plain.model)}
    plain.model.load_state_dict(state, strict=False)
    close(own(plain.model), wanted)
    learnt = {name: parameter.detach() for name, parameter in adapter_parameters(network.model)}
    save_adapters(network.model, lora, learnt, load_tokenizer(section), folder / "adapters")
    merge_adapters(folder / "adapters", folder / "merged")
    close(own(build_network(section.model_copy(update={"path": str(folder / "merged")}), LM, "zero", 0).model), wanted)
    return "yes" if not silent else f"yes, {len(silent)} of {len(trained)} tensors without gradient"


def sampling(section):
    """Sampling by transformers."""
    engine = TransformersRolloutEngine(rollout_spec(section, "transformers"))
    sampled(engine, build_network(section, LM, "zero", 0), 2e-4)
    return "in batches" if engine._concurrent > 1 else "one by one"


def sampling_by_vllm(section):
    """Sampling by vLLM."""
    spec = rollout_spec(section, "vllm")
    trained_context(spec.rollout, load_architecture(section))
    network = build_network(section, LM, "zero", 0)
    network.trunk.do_not_compile = True  # vLLM patches the classes of transformers that it uses
    engine = VLLMRolloutEngine(spec)
    try:
        sampled(engine, network, 5e-3)  # found were 2e-3 of 6.3 nats with Apertus, less than 2e-4 with the others
    finally:
        engine.close()
    return "yes"


def rollout_spec(section, backend):
    settings = {"backend": backend, "max_concurrent": 4, "max_model_length": 64, "memory_gib": 0.25}
    return RolloutSpec(section, RolloutSection.model_validate(settings), seed=0)


def change(network):
    """Change all weights, and the buffers that belong to them."""
    with torch.no_grad():
        for tensor in checkpoint_tensors(network.model):
            if not tensor.is_buffer:
                tensor.value().mul_(1.05)
            elif tensor.value().is_floating_point() and "_decay" not in tensor.name and "slope_" not in tensor.name:  # MiniMax
                tensor.value().view(-1).add_(torch.linspace(0, 0.1, tensor.value().numel()))


def sampled(engine, network, tolerance):
    """Sampled log-probs are those of scoring, before and after a sync of other weights; one response ends first."""
    for version in range(2):
        for row, limit in ((0, 9), (1, 3)):
            prompt = SAMPLES[row].token_ids[: 25 if row == 0 else 7]
            engine.submit([RolloutRequest(SampleKey(version, row, 0), prompt, row)], temperature=1.0, max_new_tokens=limit)
        for rollout in engine.poll(2):
            sequence = TokenSequence(np.concatenate([rollout.prompt_ids, rollout.response_ids]), len(rollout.prompt_ids))
            found = score_sequences(network, [sequence], LOGPROBS, temperature=1.0, token_budget=4096, device=CPU)[0]
            torch.testing.assert_close(
                torch.from_numpy(rollout.logprobs), torch.from_numpy(found.logprobs), rtol=0, atol=tolerance
            )
        if version == 0:
            change(network)
            engine.begin_weights(1)
            engine.receive_weights([(tensor.name, tensor.value()) for tensor in checkpoint_tensors(network.model)])
            engine.finish_weights()


def reward(section, folder):
    """A reward model is a sequence classifier after its export, with the same scores."""
    from transformers import AutoModelForSequenceClassification

    check_reward_model(section)
    network = build_network(section, VALUE, "normal", 0, head_bias=False)
    tokenizer = load_tokenizer(section)
    state = {tensor.name: tensor.value().clone() for tensor in checkpoint_tensors(network.model)}
    save_network(network, state, tokenizer, folder / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", attn_implementation=section.attention
    ).eval()
    scores = score_sequences(
        build_network(section.model_copy(update={"path": str(folder / "reward")}), VALUE, "zero", 0),
        SAMPLES, frozenset({"values"}), temperature=1.0, token_budget=4096, device=CPU,
    )  # fmt: skip
    for sample, score in zip(SAMPLES, scores, strict=True):
        with torch.no_grad():
            logits = classifier(input_ids=torch.from_numpy(sample.token_ids).long()[None], use_cache=False).logits
        close(score.values[-1:], logits[0].numpy())
    return "yes"


def exporting(section, folder):
    """An export computes what the network does, in transformers and here."""
    from transformers import AutoModelForCausalLM

    network = build_network(section, LM, "zero", 0)
    change(network)
    wanted = own(network.model)
    state = {tensor.name: tensor.value().clone() for tensor in checkpoint_tensors(network.model)}
    save_network(network, state, load_tokenizer(section), folder / "export")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "export", dtype=torch.float32, attn_implementation=section.attention, output_loading_info=True
    )
    assert not model[1]["missing_keys"]
    close(own(model[0].eval()), wanted)
    close(scored(build_network(section.model_copy(update={"path": str(folder / "export")}), LM, "zero", 0)), wanted)
    return "yes"


def walk(name, folder):
    """All stages of a family; what is refused on load has no other stage."""
    torch.set_num_threads(1)
    write_family(name, folder)
    section = outcome(loaded, folder)
    if isinstance(section, str):
        return {"load": section}
    found = outcome(scoring, section)
    return {
        "load": section.attention,
        **(found if isinstance(found, dict) else {"rows": found}),
        "training": outcome(training, section),
        "lora": outcome(adapters, section, folder),
        "sampling": outcome(sampling, section),
        "reward": outcome(reward, section, folder),
        "export": outcome(exporting, section, folder),
    }


def walk_vllm(name, folder):
    """The stage of vLLM; weights that it changes stay in its process."""
    torch.set_num_threads(1)
    write_family(name, folder)
    section = outcome(loaded, folder)
    return {"vllm": section if isinstance(section, str) else outcome(sampling_by_vllm, section)}


def as_recorded(found, name, folder):
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))[name]
    return {key: text.replace(str(folder), "PATH") for key, text in found.items()} == {key: recorded[key] for key in found}


@pytest.mark.parametrize("name", QUICK)
def test_a_family_computes_its_own_logprobs_in_every_role_or_is_refused(name, tmp_path):
    assert as_recorded(walk(name, tmp_path), name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in QUICK])
def test_all_other_families_do_too(name, tmp_path):
    assert as_recorded(walk(name, tmp_path), name, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=getattr(pytest.mark, "slow" if name in VLLM_SLOW else "nightly"))
        for name, row in json.loads(TABLE.read_text(encoding="utf-8")).items()
        if "vllm" in row
    ],
)
def test_vllm_samples_with_the_logprobs_of_scoring_or_is_refused(name, tmp_path):
    assert as_recorded(walk_vllm(name, tmp_path), name, tmp_path)


def test_the_table_has_all_families():
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    assert list(rows) == list(KINDS)
    assert {"yes"} == {rows[name]["vllm"] for name in VLLM_SLOW}
    assert len(KINDS) >= 40


if __name__ == "__main__":
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    stages = walk_vllm if "--vllm" in sys.argv else walk
    for family in [name for name in sys.argv[1:] if name != "--vllm"] or KINDS:
        with tempfile.TemporaryDirectory() as place:
            found = {key: text.replace(place, "PATH") for key, text in stages(family, Path(place)).items()}
        rows[family] = rows.get(family, {}) | found
        print(family, found, flush=True)
        found = {name: rows[name] for name in KINDS if name in rows}
        TABLE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
