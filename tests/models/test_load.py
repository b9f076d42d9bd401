"""Loading and saving: dtypes, mistakes in one line, dropout off."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models import load, model_path
from rayrlhf.models.load import load_causal_model, load_tokenizer, resolve_dtype
from rayrlhf.models.model_path import resolve_path
from rayrlhf.models.network import build_network

TINY = "builtin:tiny?layers=1&hidden=64"


def test_auto_is_bfloat16_only_where_the_cpu_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, expected in (({"avx2"}, torch.float32), ({"avx2", "avx512_bf16"}, torch.bfloat16)):
        monkeypatch.setattr(load, "_cpu_flags", lambda flags=flags: flags)
        assert resolve_dtype("auto") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_dtype("auto") == torch.float32  # a device that emulates it, as T4 and V100
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16") == torch.bfloat16


def test_a_run_folder_is_its_exported_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match=r"export/ holds adapters; merge them with `rayrlhf export .*/run --merge`"):
        resolve_path(ModelSection(path=str(run)))
    (run / "export" / "config.json").touch()
    assert resolve_path(ModelSection(path=str(run))) == str(run / "export")
    (run / "export-merged").mkdir()
    (run / "export-merged" / "config.json").touch()
    assert resolve_path(ModelSection(path=str(run))) == str(run / "export-merged")


def test_a_missing_folder_is_no_hub_name_and_a_near_one_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "sft-first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'runs/sft-frist': no such folder; did you mean runs/sft-first\?"):
        resolve_path(ModelSection(path="runs/sft-frist"))


def test_a_hub_that_cannot_be_reached_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    model_path.use_hub_cache_if_offline.cache_clear()
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert resolve_path(ModelSection(path="owner/name")) == "owner/name"
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    model_path.use_hub_cache_if_offline.cache_clear()


def test_a_run_without_a_model_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"this run has no model in export/ yet; finish it first"):
        resolve_path(ModelSection(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "model.path './nowhere': no such folder"),
        ("/a/b/c", "model.path '/a/b/c': no such folder"),
        ("{empty}", "has no config.json"),
    ],
)
def test_a_wrong_path_is_one_clear_line(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", "\\(")) as caught:
        resolve_path(ModelSection(path=path.format(empty=tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
    for function, message in ((load_causal_model, "has no model.safetensors"), (load_tokenizer, "no tokenizer files")):
        with pytest.raises(UserError, match=message) as caught:
            function(ModelSection(path=str(tmp_path)))
        assert "\n" not in str(caught.value)


def test_a_networks_training_mode_changes_nothing(tmp_path: Path) -> None:
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "bos_token_id": 2, "eos_token_id": 2}
    config = GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    lora = LoraSection(rank=2, dropout=0.5, target_modules=["c_attn"])
    network = build_network(ModelSection(path=str(tmp_path), lora=lora), frozenset({"lm"}), "zero", 0)
    tokens = torch.arange(11)[None]
    outputs = [network.train(mode).model(input_ids=tokens).logits for mode in (False, True)]
    assert torch.equal(*outputs)


def test_the_tokenizer_takes_the_users_template_and_has_a_pad_token(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    tokenizer = load_tokenizer(ModelSection(path=TINY, chat_template=template))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<hi>"
    assert tokenizer.pad_token_id is not None
    with pytest.raises(UserError, match="chat_template"):
        load_tokenizer(ModelSection(path=TINY, chat_template=tmp_path / "missing.jinja"))
