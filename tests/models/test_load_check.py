"""A model that is loaded computes its own log-probs, for each sample as if it were alone; anything else is refused."""

import json
import shutil
import time

import numpy as np
import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.data.records import TokenSequence
from rayrlhf.engines.scoring.frozen import FrozenEngine, score_sequences
from rayrlhf.engines.train.collate import collate
from rayrlhf.errors import UserError
from rayrlhf.models.load_check import LogitMap, check_network
from rayrlhf.models.network import build_network
from rayrlhf.models.start_check import SMALL, describe_check
from tests.models.families import write_family

CPU = torch.device("cpu")
LM = frozenset({"lm"})
RANDOM = np.random.default_rng(3)
SAMPLES = [TokenSequence(RANDOM.integers(3, 259, length).astype(np.int32), 5) for length in (40, 23, 60, 9)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name, **changes):
        key = (name, json.dumps(changes, sort_keys=True))
        if key not in made:
            made[key] = write_family(name, tmp_path_factory.mktemp(name), **changes)
        return made[key]

    return folder


def load(folder, heads=LM, **settings):
    return build_network(ModelSection(path=str(folder), dtype="float32", **settings), heads, "normal", 0)


@torch.no_grad()
def own_logprobs(network):
    found = []
    for sample in SAMPLES:
        ids = torch.from_numpy(sample.token_ids).long()
        logprobs = network.model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        found.append(logprobs[4:-1].gather(-1, ids[5:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def our_logprobs(network, *, packed):
    batch = collate(SAMPLES, 60, CPU, packed=packed)
    return network(batch.input_ids, batch.positions, frozenset({"logprobs"})).logprobs


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("llama", LogitMap()),
        ("granite", LogitMap(0.125)),
        ("gemma2", LogitMap(1.0, 5.0)),
        ("recurrent_gemma", LogitMap(1.0, 5.0)),
        ("gemma4_text", LogitMap(1.0, 5.0)),
    ],
)
def test_what_follows_the_output_layer_is_found_and_applied(folders, name, logits):
    network = load(folders(name))
    assert network.check.logits == logits
    torch.testing.assert_close(our_logprobs(network, packed=False), own_logprobs(network), rtol=0, atol=1e-5)


def test_a_cap_far_above_the_logits_is_found_too(folders):
    network = load(folders("gemma2", final_logit_softcapping=200.0))
    assert network.check.logits == LogitMap(1.0, 200.0)
    assert network.check.gap < 1e-5


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama", "packed"), ("mistral", "packed"), ("nemotron", "packed"), ("opt", "packed"), ("falcon", "padded"),
     ("falcon_alibi", "padded"), ("qwen3_5", "padded"), ("lfm2", "padded")],
)  # fmt: skip
def test_packed_rows_are_used_only_where_samples_do_not_see_each_other(folders, name, layout):
    network = load(folders(name))
    expected = own_logprobs(network)
    network.accept_packed_rows()
    assert network.check.layout == layout
    for packed in (False, True):
        torch.testing.assert_close(our_logprobs(network, packed=packed), expected, rtol=1e-5, atol=1e-5)
    assert ("may be packed" in network.check.line()) == (layout == "packed")


def test_frequencies_that_depend_on_the_longest_neighbor_are_computed_alone(folders):
    network = load(folders("phi3_longrope"))
    expected = own_logprobs(network)
    network.accept_packed_rows()
    assert network.check.longest_together == 32
    for packed in (False, True):
        torch.testing.assert_close(our_logprobs(network, packed=packed), expected, rtol=0, atol=1e-5)
    assert "beyond 32 tokens one by one" in network.check.line()


def test_the_check_takes_four_forward_passes_of_few_tokens(folders, monkeypatch):
    from transformers import LlamaModel

    passes, original = [], LlamaModel.forward

    def counted(self, input_ids, **rest):
        passes.append(input_ids.numel())
        return original(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    for unshared, last in (("", 36), ("why", 32)):
        network = load(folders("llama"))
        network.accept_packed_rows(unshared=unshared)
        assert (network.check.layout, network.check.shares_prefixes) == ("packed", not unshared)
        assert passes == [60, 20, 12, last]
        passes.clear()


def test_a_model_with_more_behind_its_output_layer_is_refused_in_one_line(folders, monkeypatch):
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def other(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits - 3 * output.logits.abs().sqrt()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", other)
    with pytest.raises(UserError, match=r"^model\.path '.*': the log-probs of a llama model differ by up to \d") as refused:
        load(folders("llama"))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="llama"):
        FrozenEngine(ModelSection(path=str(folders("llama")), dtype="float32"), 4096)
    with pytest.raises(UserError, match="llama"):
        describe_check(ModelSection(path=str(folders("llama")), dtype="float32"), LM)


def test_a_gradient_flows_through_the_soft_cap_as_through_the_models_own(folders):
    network = load(folders("gemma2"))
    ids = torch.from_numpy(SAMPLES[1].token_ids).long()
    grads = []
    for ours in (True, False):
        network.zero_grad()
        if ours:
            batch = collate([SAMPLES[1]], 60, CPU)
            output = network(batch.input_ids, batch.positions, frozenset({"logprobs", "entropy"}), 0.7)
            (output.logprobs.sum() + 0.3 * output.entropy.sum()).backward()
        else:
            logprobs = (network.model(input_ids=ids[None], use_cache=False).logits[0, 4:-1] / 0.7).log_softmax(-1)
            (logprobs.gather(-1, ids[5:, None]).sum() - 0.3 * (logprobs.exp() * logprobs).sum()).backward()
        grads.append({name: p.grad.clone() for name, p in network.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-4)


def test_hidden_states_of_a_capped_model_are_refused_and_of_a_scaled_one_scaled(folders):
    batch = collate(SAMPLES, 60, CPU)
    with pytest.raises(UserError, match="caps its logits"):
        load(folders("gemma2"))(batch.input_ids, batch.positions, frozenset({"hidden"}))
    network = load(folders("granite"))
    with torch.no_grad():
        output = network(batch.input_ids, batch.positions, frozenset({"hidden", "logprobs"}))
        head = network.model.get_output_embeddings()
        logprobs = (output.hidden @ head.weight.T).log_softmax(-1).gather(-1, batch.positions.targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, output.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["opt", "seed_oss", "gpt_bigcode", "llama"])
def test_recomputing_activations_switches_no_dropout_on(folders, name):
    changes = {"opt": {"dropout": 0.5}, "seed_oss": {"residual_dropout": 0.5, "attention_dropout": 0.5},
               "gpt_bigcode": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}}.get(name, {})  # fmt: skip
    network = load(folders(name, **changes), gradient_checkpointing=True)
    network.train()
    torch.testing.assert_close(
        our_logprobs(network, packed=False), own_logprobs(load(folders(name, **changes))), rtol=0, atol=1e-5
    )


def test_noise_that_stays_on_in_training_mode_is_refused(folders, monkeypatch):
    from transformers import LlamaModel

    original = LlamaModel.forward

    def noisy(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if self.training:
            output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    monkeypatch.setattr(LlamaModel, "forward", noisy)
    with pytest.raises(UserError, match=r"gradient_checkpointing.*llama"):
        load(folders("llama"), gradient_checkpointing=True)
    load(folders("llama"))


def test_noise_on_embeddings_is_refused_where_they_are_not_all_that_the_trunk_reads(folders):
    load(folders("llama")).add_noise(5.0)
    with pytest.raises(UserError, match=r"train\.neftune_alpha: a gemma4_text model"):
        load(folders("gemma4_text")).add_noise(5.0)


def test_a_critic_is_checked_on_its_trunk(folders):
    critic = load(folders("falcon_alibi"), frozenset({"value"}))
    critic.accept_packed_rows()
    assert critic.check.layout == "padded"
    values = []
    for packed in (False, True):
        batch = collate(SAMPLES, 61, CPU, packed=packed)
        with torch.no_grad():
            values.append(critic(batch.input_ids, batch.positions, frozenset({"values"})).values)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-4)


def test_weights_that_the_files_lack_are_named(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("llama"), tmp_path / "holes")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weight is not in the files, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize(
    "family", ["gemma3", "gemma3n", "gemma4", "qwen3_5", "qwen2_5_vl", "llama4", "mistral3", "llava", "smolvlm", "internvl"]
)
def test_multimodal_models_are_refused_by_every_role(family, tmp_path):
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), dtype="float32")
    for attempt in (
        lambda: build_network(section, LM, "zero", 0),
        lambda: build_network(section, frozenset({"value"}), "zero", 0),
        lambda: FrozenEngine(section, 4096),
        lambda: describe_check(section, LM),
    ):
        with pytest.raises(UserError, match=f"{family} is a multimodal model, expected a text-only checkpoint"):
            attempt()


def test_the_check_is_told_in_words_and_large_models_are_left_to_the_run(folders, monkeypatch):
    section = ModelSection(path=str(folders("granite")), dtype="float32")
    assert describe_check(section, LM, packing=True) == (
        "granite, log-probs within 1e-06 nats of the model's own on 32 random tokens, logits scaled by 0.125, "
        "samples may be packed and share prefixes"
    )
    assert describe_check(section, LM, packing=True, unshared="why").endswith(
        "samples may be packed, prefixes are not shared: why"
    )
    assert SMALL == 2 * 2**30
    monkeypatch.setattr("rayrlhf.models.start_check.SMALL", 0)
    assert describe_check(section, LM) == "0.0 GiB of weights, checked when the run loads it"
    assert describe_check(section, LM, unshared="why").endswith("checked when the run loads it, prefixes are not shared: why")


def test_scoring_uses_the_layout_that_was_found(folders):
    network = load(folders("phi3_longrope"))
    scores = score_sequences(network, SAMPLES, frozenset({"logprobs"}), temperature=1.0, token_budget=4096, device=CPU)
    found = torch.cat([torch.from_numpy(score.logprobs) for score in scores])
    torch.testing.assert_close(found, own_logprobs(network), rtol=0, atol=1e-5)


@pytest.mark.nightly
def test_the_check_of_a_model_of_135_million_parameters_takes_less_than_a_second(monkeypatch):
    seconds = []

    def timed(step):
        def run(*arguments, **settings):
            started = time.monotonic()
            found = step(*arguments, **settings)
            seconds.append(time.monotonic() - started)
            return found

        return run

    monkeypatch.setattr("rayrlhf.models.network.check_network", timed(check_network))
    network = build_network(ModelSection(path="builtin:smollm2-135m-instruct", dtype="float32"), LM, "zero", 0)
    timed(network.accept_packed_rows)()
    print(f"{sum(seconds):.2f} s: {network.check.line()}")
    assert sum(seconds) < 1.0
