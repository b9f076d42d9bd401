"""vLLM and the trainer compute the same state after every layer, and the first that differs is named."""

import json
from functools import partial

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.lora import checkpoint_tensors
from rayrlhf.tools.doctor import parity
from rayrlhf.tools.doctor.parity import ParityAudit
from tests.models.families import write_family

LAYERS = [f"model.layers.{number}" for number in range(3)]


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    folder = write_family("llama", tmp_path_factory.mktemp("model") / "llama")
    with ParityAudit(ModelSection(path=str(folder), dtype="float32")) as audit:
        yield audit


def serve(audit, **changed):
    """Send the engine the trainer's weights, each of `changed` multiplied by its factor."""
    tensors = {tensor.name: tensor.value().clone() for tensor in checkpoint_tensors(audit._network.model)}
    for name, factor in changed.items():
        tensors[name] *= factor
    audit.engine.begin_weights(audit.engine.version + 1)
    audit.engine.receive_weights(list(tensors.items()))
    audit.engine.finish_weights()


def test_all_states_are_equal_within_rounding_of_float32(audit):
    found = audit.compare()
    assert [gap.place for gap in found.gaps] == ["embedding", *LAYERS, "final norm", "logits", "log-probs"]
    assert found.first_difference is None
    assert max(gap.relative for gap in found.gaps) < 1e-4
    assert found.gaps[0].absolute == 0
    assert 0 < found.gaps[2].absolute < 1e-4
    assert found.nats.mean <= found.nats.largest == found.gaps[-1].absolute
    assert found.lines()[-2] == "equal within 0.0001"


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1"),
        ("model.layers.2.mlp.down_proj.weight", "model.layers.2"),
        ("model.norm.weight", "final norm"),
        ("lm_head.weight", "logits"),
    ],
)
def test_a_changed_weight_is_named_at_its_place(audit, weight, place):
    serve(audit, **{weight: 1.02})
    found = audit.compare()
    serve(audit)
    assert found.first_difference.place == place
    assert f"first difference at {place}, " in found.lines()[-2]


def test_layers_that_hold_another_state_or_are_not_found_are_one_line(audit, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(audit, "_layers", 5)
        with pytest.raises(UserError, match=r"layers of a llama model cannot be matched: a model has no list of 5 layers$"):
            audit.compare()
    copy, copied = parity._Probe._copy, []

    def other_form(probe, state):
        copied.append(state)
        return copy(probe, state) * (3.0 if state.dim() == 2 and len(copied) < 8 else 1.0)

    monkeypatch.setattr(parity._Probe, "_copy", other_form)
    with pytest.raises(UserError, match=r"cannot be matched: logits agree, and states after embedding do not$"):
        audit.compare()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parity", "builtin:tiny", "--dtype", "float16"], "--dtype float16: expected auto, float32, bfloat16"),
        (["--dtype", "float32"], "--dtype float32: has no effect without --parity MODEL"),
        (["--parity", "builtin:tiny", "--gpu"], "--gpu and --parity are two checks: expected one of them"),
        (["--parity", "builtin:none"], "builtin:none"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    found = CliRunner().invoke(app, ["doctor", *arguments])
    assert isinstance(found.exception, UserError)
    assert said in str(found.exception)
    assert "\n" not in str(found.exception)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_compares_a_qwen2_model_with_biases_and_tells_what_a_float32_head_gives(tmp_path, dtype):
    folder = write_family("qwen2", tmp_path / "qwen2")
    run = partial(CliRunner().invoke, app, ["doctor", "--parity", str(folder), "--dtype", dtype, "--json"])
    found = run(catch_exceptions=False)
    assert found.exit_code == 0
    tree = json.loads(found.output)
    gaps = {place: relative for place, _, relative in tree["gaps"]}
    if dtype == "float32":
        assert max(gaps.values()) < 1e-4
        assert tree["float32_head"] is None
    else:
        assert 0 < gaps["embedding"] < gaps["model.layers.0"] < tree["tolerance"]
        assert 0 < tree["float32_head"][0] < 2 * tree["nats"][0]
