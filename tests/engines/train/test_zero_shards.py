"""No rank holds the whole of a model under ZeRO-3: while it loads, while it is checked, and while it is exported."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.train.backends.deepspeed import DeepSpeedBackend
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.process_group import ProcessGroupSpec, join, make_grid
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models import rounding
from rayrlhf.models.load import load_causal_model
from rayrlhf.models.network import build_network
from rayrlhf.models.tiny import byte_tokenizer
from tests.engines.training import free_port, leave_at_once, random_batch, random_sequences
from tests.models.bytes_held import BytesHeld

pytestmark = pytest.mark.slow

LM = frozenset({"lm"})
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "checkpointed": {"gradient_checkpointing": True},
    "adapters": {"lora": LoraSection(rank=4), "gradient_checkpointing": True},
    "experts": {},
}
RUN = {2: list(CASES), 4: ["adapters"]}
SHARED = {"whole": (2, 1), "experts": (1, 2)}
"""Ranks that share weights, and experts, of the network before it trains, by case."""
CPU = torch.device("cpu")


def write(folder: Path, *, hidden: int, layers: int, vocabulary: int, tie: bool = False, dtype: str = "bfloat16") -> None:
    """Write a random Llama with a tokenizer in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, tie_word_embeddings=tie,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="200MB")
    byte_tokenizer().save_pretrained(folder)


def write_experts(folder: Path) -> None:
    """Write a random mixture of experts with a tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def spec(path: Path, **settings: Any) -> TrainEngineSpec:
    train = TrainSection(zero_stage=3)
    return TrainEngineSpec(ModelSection(path=str(path), dtype="float32", **settings), LM, train, 1e-2, packing=True)


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    """Count the bytes of each case, and leave them with the weights in the folder."""
    rounding.PART = 4096
    for case in RUN[ranks]:
        settings = CASES[case]
        made = spec(folder / ("experts" if case == "experts" else "model"), **settings)
        with BytesHeld() as plain:
            network = build_network(made.model, LM, "zero", 0)
        whole = sum(parameter.nbytes for parameter in network.parameters())
        sizes = [parameter.nbytes for name, parameter in network.named_parameters() if "lora" not in name]
        numbers = max(parameter.numel() for parameter in network.parameters())
        module = max(sum(own.nbytes for own in part.parameters(recurse=False)) for part in network.modules())
        found: dict[str, Any] = {
            "whole": whole,
            "largest": max(sizes),
            "module": module,
            "numbers": numbers,
            "checks": plain.peak - whole,
        }
        del network
        shards = DeepSpeedBackend.weight_shards(made.train, torch.float32, CPU)
        with BytesHeld() as held:
            load_causal_model(made.model, frozen=made.model.lora is not None, shards=shards)
        found |= {"load": held.peak, "after": held.now}
        with BytesHeld() as held:
            network = build_network(made.model, LM, "zero", 0, shards=shards)
        found["build"] = held.peak
        if case in SHARED and (split := make_grid(1, *SHARED[case]).weight_split) is not None:
            held.peak = 0
            with shards.in_use(network.model), held:
                split.cut(network.model, shards)
            found["cut"] = held.peak
        del network
        engine = TrainEngine(made)
        found["line"] = engine.load_check
        engine.update(random_batch(random_sequences(4), 0), UpdatePlan([[[0, 1, 2, 3]]]), PolicyObjective())
        with BytesHeld() as held:
            engine.export(folder / f"export-{ranks}-{case}")
        found["export"] = held.peak
        (folder / f"{case}-{ranks}-{rank}.json").write_text(json.dumps(found))


def main() -> None:
    what, rank, ranks, port, folder = sys.argv[1:]
    torch.set_num_threads(1)
    join(ProcessGroupSpec(int(rank), int(ranks), "127.0.0.1", int(port), timeout_seconds=500))
    {"count": run_rank, "measure": measure_rank}[what](int(rank), int(ranks), Path(folder))
    leave_at_once()


def run(what: str, ranks: int, folder: Path) -> None:
    code, port = f"from {__name__} import main; main()", free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, what, str(rank), str(ranks), str(port), str(folder)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=900)[1].decode() for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "model", hidden=128, layers=4, vocabulary=1024)
    write_experts(folder / "experts")
    for ranks in RUN:
        run("count", ranks, folder)
    return folder


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, cases in RUN.items() for case in cases])
def test_a_rank_holds_its_part_and_two_tensors_at_most(counted: Path, ranks: int, case: str) -> None:
    for rank in range(ranks):
        found = json.loads((counted / f"{case}-{ranks}-{rank}.json").read_text())
        own = found["whole"] / ranks
        assert found["whole"] > 5 * found["largest"]
        assert own * 0.9 < found["after"] <= own + 20_000  # norms are divided too; the rest is rotary buffers
        assert found["load"] <= own + 2 * found["largest"] + 20_000
        assert found["build"] <= own + 2 * found["module"] + found["checks"] + 50_000  # experts of a layer are one module
        assert found.get("cut", 0) <= own + 2 * found["largest"] + 20_000
        assert found["export"] <= 2 * 4 * found["numbers"] + 50_000  # adapters are merged in float32
        assert "samples may be packed" in found["line"]


def test_ranks_export_one_model_whatever_their_number(counted: Path) -> None:
    first, second = (load_file(counted / f"export-{ranks}-adapters" / "model.safetensors") for ranks in RUN)
    start = load_causal_model(ModelSection(path=str(counted / "model")))
    assert first.keys() == {name for name, _ in start.named_parameters()}
    moved = 0
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(second[name], tensor, rtol=0.02, atol=2e-4)
        moved += int(not torch.equal(tensor.float(), start.get_parameter(name)))
    assert moved > 3


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Largest growth of a process's own memory, sampled."""

    def __enter__(self) -> "Peak":
        self._start = self._most = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.is_set():
            self._most = max(self._most, anonymous())
            time.sleep(0.003)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self._most - self._start


def measure_rank(rank: int, ranks: int, folder: Path) -> None:
    made = spec(folder / "model")
    shards = DeepSpeedBackend.weight_shards(made.train, torch.float32, CPU)
    torch.distributed.barrier()
    with Peak() as load:
        load_causal_model(made.model, shards=shards)
    with Peak() as build:
        engine = TrainEngine(made)
    parameters = list(engine._network.model.parameters())
    whole = sum(4 * parameter.ds_numel for parameter in parameters)
    with Peak() as export:
        engine.export(folder / "export")
    found = {"whole": whole, "largest": 4 * max(parameter.ds_numel for parameter in parameters), "parameters": whole // 4}
    found |= {"load": load.bytes, "build": build.bytes, "export": export.bytes}
    (folder / f"measured-{rank}.json").write_text(json.dumps(found))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_of_half_a_billion_parameters_takes_its_part_of_the_machine(ranks: int, tmp_path: Path) -> None:
    write(tmp_path / "model", hidden=1536, layers=15, vocabulary=32_000)
    run("measure", ranks, tmp_path)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"measured-{rank}.json").read_text())
        print({key: round(value / 2**20) for key, value in found.items()})
        assert found["parameters"] > 500_000_000
        own, slack = found["whole"] / ranks, 64 * 2**20  # allocator and gather buffers
        assert found["load"] <= own + 2 * found["largest"] + slack
        assert found["export"] <= 2 * found["largest"] + slack
