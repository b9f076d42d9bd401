"""Model folders as people have them: used whole, what is not used is named, or refused in one line."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrlhf.config.model import ModelSection
from rayrlhf.data.templates import require_chat_template
from rayrlhf.engines.rollout.common import stop_token_ids
from rayrlhf.errors import UserError
from rayrlhf.models.load import checkpoint_dtype, load_causal_model, load_tokenizer, save_model_folder
from rayrlhf.models.model_path import model_folder
from rayrlhf.models.start_check import check_generating_model, check_tokens, describe_check
from rayrlhf.models.tiny import byte_tokenizer
from tests.models.families import USUAL, write_family
from tests.models.hub import as_hub_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
UP = "model.layers.1.mlp.up_proj.weight"


def set_file(name, folder, **changes):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


set_config = partial(set_file, "config.json")
set_tokenizer = partial(set_file, "tokenizer_config.json")


def set_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def parts(folder, *, missing=()):
    """Split the weights into two pickled parts with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2)]
    places = {name: names[index % 2] for index, name in enumerate(tensors)}
    for name in set(names) - set(missing):
        torch.save({key: tensors[key] for key in places if places[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def only(name):
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def pickled(value):
    def change(folder):
        (folder / WEIGHTS).unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return change


def adapters(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def tokens(name, key, value):
    """A special token of `config.json` or `generation_config.json`."""
    several = " or a list of them" if key.startswith("eos") else ""
    limits = "to 263, the last row" if (name, key) == ("config.json", "pad_token_id") else ""
    shown = re.escape(f"{name}: {key} {value!r}, expected a token id{several}, from 0 {limits}".rstrip())
    return partial(set_file, name, **{key: value}), shown


CONFIGURATION, GENERATION = "config.json", "generation_config.json"
REFUSED = {
    "no weights": (only("consolidated.safetensors"), r"no model\.safetensors or .*, only consolidated\.safetensors"),
    "GGUF": (only("model.gguf"), r"no model\.safetensors or .*, only model\.gguf"),
    "cut weights": (cut(WEIGHTS, -1000), r"model\.safetensors: \d+ bytes, expected \d+ by its header"),
    "cut header": (cut(WEIGHTS, 100), r"model\.safetensors: damaged or cut"),
    "empty file": (cut(WEIGHTS, 0), r"model\.safetensors: damaged or cut"),
    "pointer": (write(WEIGHTS, LFS), r"model\.safetensors: a Git LFS pointer"),
    "pointer of a tokenizer": (write("tokenizer.json", LFS), r"tokenizer\.json: a Git LFS pointer"),
    "missing part": (lambda folder: parts(folder, missing=["pytorch_model-00002-of-00002.bin"]), r"00002\.bin is missing"),
    "index without map": (lambda folder: [only("x.safetensors")(folder), write(INDEX, "{}")(folder)], "has no weight_map"),
    "cut index": (lambda folder: [only("x.safetensors")(folder), write(INDEX, '{"a"')(folder)], r"index\.json is not JSON"),
    "objects": (pickled({"a": Path("a")}), "holds Python objects"),
    "cut pickle": (lambda folder: [pickled({})(folder), cut("pytorch_model.bin", 200)(folder)], "damaged or cut"),
    "cut configuration": (cut("config.json", 20), r"config\.json is not JSON"),
    "list for a configuration": (write("generation_config.json", "[]"), r"generation_config\.json: expected a JSON object"),
    "unknown type": (lambda folder: set_config(folder, model_type="llama9"), "`llama9`"),
    "code": (
        lambda folder: set_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own"}),
        "Python code of its own; read that, and set model.trust_remote_code",
    ),
    "wrong type": (lambda folder: set_config(folder, hidden_size=None), "Field 'hidden_size' expected int"),
    "unknown function": (lambda folder: set_config(folder, hidden_act="zelu"), "transformers knows no 'zelu'"),
    "more layers": (lambda folder: set_config(folder, num_hidden_layers=4), "9 weights are not in the files"),
    "other shape": (
        lambda folder: set_config(folder, intermediate_size=128),
        r"down_proj\.weight has shape \[64, 96\], expected \[64, 128\] by config\.json",
    ),
    "tied and apart": (lambda folder: set_config(folder, tie_word_embeddings=True), "config.json says tie_word_embeddings"),
    "NaN": (lambda folder: set_weights(folder, lambda t: t[UP][0].fill_(torch.nan)), f"{UP} holds NaN"),
    "quantized": (lambda folder: set_config(folder, quantization_config={"quant_method": "awq"}), r"quantized .*\(awq\)"),
    "8 bits": (
        lambda folder: set_weights(folder, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        f"{UP} is stored as F8_E4M3",
    ),
    "ends in a list of lists": tokens(GENERATION, "eos_token_id", [[2]]),
    "an end as text": tokens(GENERATION, "eos_token_id", "2"),
    "an end as text in a list": tokens(GENERATION, "eos_token_id", [2, "<|im_end|>"]),
    "an end as a float": tokens(GENERATION, "eos_token_id", 2.0),
    "an end that is true": tokens(GENERATION, "eos_token_id", True),
    "an end as an object": tokens(GENERATION, "eos_token_id", {"id": 2}),
    "a negative end": tokens(GENERATION, "eos_token_id", -2),
    "two beginnings": tokens(GENERATION, "bos_token_id", [1, 2]),
    "padding as text": tokens(GENERATION, "pad_token_id", "0"),
    "ends in a list of lists, of the configuration": tokens(CONFIGURATION, "eos_token_id", [[2]]),
    "an end as a float, of the configuration": tokens(CONFIGURATION, "eos_token_id", 2.5),
    "a beginning as text, of the configuration": tokens(CONFIGURATION, "bos_token_id", "1"),
    "padding beyond the vocabulary, of the configuration": tokens(CONFIGURATION, "pad_token_id", 264),
    "a tokenizer's end as a number": (
        lambda folder: set_tokenizer(folder, eos_token=2),
        "cannot load its tokenizer: Special token eos_token has to be either str",
    ),
    "a tokenizer's beginning as a list": (
        lambda folder: set_tokenizer(folder, bos_token=["a"]),
        "cannot load its tokenizer: Special token bos_token has to be either str",
    ),
    "a tokenizer's length as text": (
        lambda folder: set_tokenizer(folder, model_max_length="long"),
        r"tokenizer_config\.json: model_max_length 'long', expected a number",
    ),
    "adapters too": (adapters, "adapters .* next to a model"),
    "adapters alone": (lambda folder: [adapters(folder), (folder / "config.json").unlink()], "the folder holds adapters"),
}
USED = {
    "parts": (parts, "share prefixes$"),
    "no metadata": (lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS), "share prefixes$"),
    "one more tensor": (
        lambda folder: set_weights(folder, lambda t: t.update({"score.weight": torch.zeros(1, 64)})),
        r"not used of its files: score\.weight$",
    ),
    "fewer layers": (
        lambda folder: set_config(folder, num_hidden_layers=2),
        r"not used of its files: model\.layers\.2\.\S+ and 8 more$",
    ),
    "float64": (lambda folder: set_weights(folder, lambda t: t.update({UP: t[UP].double()})), "share prefixes$"),
    "two types": (lambda folder: set_weights(folder, lambda t: t.update({UP: t[UP].half()})), "share prefixes$"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def changed(llama, tmp_path):
    def change(by):
        folder = shutil.copytree(llama, tmp_path / "model")
        by(folder)
        return ModelSection(path=str(folder), dtype="float32")

    return change


def outcome(model, head="lm"):
    load_tokenizer(model)
    return describe_check(model, frozenset({head}), packing=True)


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(name, changed):
    change, message = REFUSED[name]
    model = changed(change)
    with pytest.raises(UserError, match=message) as refused:
        outcome(model)
    assert str(refused.value).startswith(f"model.path {model.path!r}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", USED)
def test_what_is_not_used_of_the_files_is_named(name, changed):
    change, line = USED[name]
    assert re.search(line, outcome(changed(change)))


def test_a_trunk_leaves_heads_in_the_files_without_a_word(llama):
    assert outcome(ModelSection(path=str(llama), dtype="float32"), "value") == "llama, samples may be packed and share prefixes"


def test_a_critic_names_a_head_that_it_cannot_start_from(changed):
    def labels(folder):
        set_weights(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(3, 64)}))

    model = changed(labels)
    assert outcome(model, "value").endswith("not used of its files: score.weight")
    set_weights(Path(model.path), lambda tensors: tensors.update({"score.weight": torch.zeros(1, 64)}))
    assert "not used" not in outcome(model, "value")


def test_a_hub_model_is_checked_as_a_folder_is(llama, tmp_path, monkeypatch):
    snapshot = as_hub_model(llama, tmp_path, "acme/tiny", monkeypatch)
    model = ModelSection(path="acme/tiny", dtype="float32")
    assert outcome(model).startswith("llama, log-probs within 1e-06 nats")
    REFUSED["8 bits"][0](snapshot)
    for attempt in (outcome, load_causal_model):
        with pytest.raises(UserError, match=f"model.path 'acme/tiny': .*{UP} is stored as F8_E4M3"):
            attempt(model)
    (snapshot / WEIGHTS).unlink()
    assert outcome(model) == "a model of the hub that is not in its cache, checked when the run loads it"


@pytest.mark.parametrize("named", ["bfloat16", None])
def test_a_checkpoint_has_the_type_of_its_weights_where_the_configuration_names_none(named, changed):
    model = changed(lambda folder: set_weights(folder, lambda t: t.update({name: t[name].half() for name in t})))
    set_config(Path(model.path), dtype=named)
    assert checkpoint_dtype(model) == (torch.bfloat16 if named else torch.float16)


def test_engines_may_read_quantized_files_but_not_cut_ones(changed):
    model = changed(REFUSED["8 bits"][0])
    check_generating_model(model, "vllm", 1, "rollout")
    with pytest.raises(UserError, match="F8_E4M3"):
        check_generating_model(model, "transformers", 1, "rollout")
    file = Path(model.path) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="by its header"):
        check_generating_model(model, "vllm", 1, "rollout")


SMALL = {key: value for key, value in USUAL.items() if key not in ("num_key_value_heads", "head_dim")}


@pytest.mark.parametrize(
    ("kind", "options", "head", "message"),
    [
        ("bert", SMALL, "lm", "its tokens see later ones"),
        ("electra", SMALL, "lm", "not computed as trunk and output layer"),
        ("electra", SMALL, "value", "its tokens see later ones"),
        (
            "xlnet",
            {"vocab_size": 264, "d_model": 64, "n_layer": 2, "n_head": 2, "d_inner": 96},
            "lm",
            "its tokens see later ones",
        ),
        (
            "t5",
            {"vocab_size": 264, "d_model": 64, "num_layers": 1, "d_ff": 64, "num_heads": 2},
            "lm",
            "an encoder-decoder model",
        ),
        ("vit", {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}, "value", "has no vocabulary"),
    ],
)
def test_models_that_are_not_causal_are_refused(kind, options, head, message, tmp_path):
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if head == "lm" and kind != "t5" else AutoModel
    auto.from_config(CONFIG_MAPPING[kind](**options), dtype=torch.float32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    attention = "eager" if kind == "xlnet" else "sdpa"
    with pytest.raises(UserError, match=message) as refused:
        outcome(ModelSection(path=str(tmp_path), dtype="float32", attention=attention), head)
    assert "\n" not in str(refused.value)


def test_chat_templates_without_a_default_are_named(changed):
    tokenizer = load_tokenizer(changed(lambda folder: None))
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(UserError, match="the chat templates rag, tool_use and no default"):
        require_chat_template(tokenizer)


@pytest.mark.parametrize("value", [None, [], 2, [2, 1]])
def test_stop_tokens_are_those_of_the_files(value, changed):
    model = changed(lambda folder: (folder / GENERATION).write_text(json.dumps({"eos_token_id": value, "bos_token_id": -1})))
    assert outcome(model).startswith("llama, ")
    assert stop_token_ids(model, load_tokenizer(model)) == sorted({2, *(value if isinstance(value, list) else [value or 2])})


def test_stop_tokens_of_a_hub_model_that_are_none_are_named(llama, tmp_path, monkeypatch):
    snapshot = as_hub_model(llama, tmp_path, "acme/tiny", monkeypatch)
    change, message = tokens(GENERATION, "eos_token_id", [[2]])
    change(snapshot)
    model = ModelSection(path="acme/tiny", dtype="float32")
    with pytest.raises(UserError, match=message):
        outcome(model)
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id \[\[2\]\], expected a token id"):
        stop_token_ids(model, load_tokenizer(ModelSection(path=str(llama))))


def test_a_tokenizers_end_beyond_the_vocabulary_is_named(changed, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|new{one}|>" for one in range(8)]})
    check_tokens(changed(tokenizer.save_pretrained), tokenizer, [])
    tokenizer.add_special_tokens({"eos_token": "<|over|>"})
    model = ModelSection(path=str(tmp_path / "model"), dtype="float32")
    tokenizer.save_pretrained(model.path)
    with pytest.raises(UserError, match=r"its tokenizer writes '<\|over\|>' as token 2\d\d, expected at most 263"):
        check_tokens(model, load_tokenizer(model), [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.6},
        {"temperature": "hot"},
        {"top_k": -1, "eos_token_id": [2, 5]},
        {"max_length": 40, "pad_token_id": -1},
    ],
)
def test_an_invalid_generation_config_does_not_stop_an_export(wrong, changed, tmp_path):
    model = changed(write("generation_config.json", json.dumps({"eos_token_id": 2} | wrong)))
    network = load_causal_model(model)
    save_model_folder(tmp_path / "out", network, network.state_dict(), None)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    expected = ({"eos_token_id": 2} | wrong)["eos_token_id"]
    assert written["eos_token_id"] == expected
    assert stop_token_ids(model, load_tokenizer(model)) == (expected if isinstance(expected, list) else [expected])


def test_a_cached_hub_model_without_files_of_other_formats_is_found(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import IncompleteSnapshotError

    def fetch(name, **settings):
        assert "original/*" in settings["ignore_patterns"]
        raise IncompleteSnapshotError("1 file is missing", str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model_folder(ModelSection(path="acme/model")) == tmp_path


@pytest.mark.parametrize(("file", "end"), [(GENERATION, [2, 50256]), (CONFIGURATION, -1), (CONFIGURATION, 50256)])
def test_ends_that_are_never_sampled_are_no_mistake(changed, file, end):
    outcome(changed(partial(set_file, file, bos_token_id=50256, eos_token_id=end)))
