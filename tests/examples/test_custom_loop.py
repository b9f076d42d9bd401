"""The custom loop of `examples/` trains with its own reward, exports a model and chats."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_loop.py"


@pytest.mark.slow
def test_the_example_is_short_and_ends_with_an_exported_model_and_a_chat(tmp_path, capsys):
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60
    runpy.run_path(str(EXAMPLE))["main"](tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in printed if line.endswith("nats")] == ["step 1", "step 2", "step 3", "step 4"]
    (result,) = (line for line in printed if line.startswith("held-out reward"))
    before, after = (float(word) for word in result.split(";")[0].split() if word[0].isdigit())
    assert after > before
    assert any(line.startswith("3 + 4 = ?") for line in printed)
    assert (tmp_path / "custom-loop" / "export" / "model.safetensors").is_file()
