"""Memory estimates against hand numbers, published counts, and what autograd and the train engine really keep."""

from dataclasses import replace

import pytest
import torch

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.tools.launch.memory_plan import (
    BUCKET_ELEMENTS,
    FLOAT,
    GIB,
    LIVE_ELEMENTS,
    LOGIT_BUFFERS,
    Precision,
    activation_bytes,
    cache_bytes_per_token,
    frozen_memory,
    sync_bytes,
    train_memory,
)
from rayrlhf.tools.launch.model_shape import read_shape, shape_of
from tests.engines.training import join_alone, write_llama
from tests.models.test_held_weights import store
from tests.tools.launch.models import LLAMA_7B, LLAMA_70B, QWEN_32B, write_model

HALF, FULL = Precision(2), Precision(4)
PARAMETERS_7B, PARAMETERS_70B = 6_738_415_616, 68_976_648_192
"""Llama 2's, as published with its weights."""


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    return read_shape(ModelSection(path=str(write_model(tmp_path_factory.mktemp("m") / "7b", LLAMA_7B))))


@pytest.fixture(scope="module")
def seventy(tmp_path_factory):
    return read_shape(ModelSection(path=str(write_model(tmp_path_factory.mktemp("m") / "70b", LLAMA_70B))))


def test_parameters_of_7b_and_70b_are_the_published_ones_and_nothing_is_allocated(seven, seventy):
    assert (seven.parameters, seventy.parameters) == (PARAMETERS_7B, PARAMETERS_70B)
    assert seven.linear == PARAMETERS_7B - 2 * 32000 * 4096 - (2 * 32 + 1) * 4096


def test_adapters_of_7b_on_query_and_value_are_the_4_million_of_the_lora_paper(tmp_path):
    lora = LoraSection(rank=8, target_modules=["q_proj", "v_proj"])
    shape = read_shape(ModelSection(path=str(write_model(tmp_path / "7b", LLAMA_7B)), lora=lora))
    assert shape.trainable == 4_194_304
    upper = read_shape(
        ModelSection(
            path=str(write_model(tmp_path / "7b", LLAMA_7B)),
            lora=lora.model_copy(update={"last_layers": 8}),
        )
    )
    assert (upper.trainable, upper.learned_layers) == (4_194_304 // 4, 8)


@pytest.mark.parametrize(
    ("stage", "ranks", "gib"),
    [
        # weights + gradients + moments of float32 at 7B: 4 + 4 + 8 bytes a parameter
        (0, 1, 16 * PARAMETERS_7B / GIB),
        (0, 8, 16 * PARAMETERS_7B / GIB),
        # stage 1 shards moments and the master copy: 4 + 4 + 12/8
        (1, 8, (8 + 12 / 8) * PARAMETERS_7B / GIB),
        # stage 2 gradients as well: 4 + 16/8
        (2, 8, (4 + 16 / 8) * PARAMETERS_7B / GIB),
        # stage 3 everything: 20/8
        (3, 8, 20 / 8 * PARAMETERS_7B / GIB),
    ],
)
def test_sharded_bytes_of_7b_are_those_of_the_zero_paper_at_float32(seven, stage, ranks, gib):
    memory = train_memory(seven, TrainSection(zero_stage=stage), FULL, ranks=ranks, tokens=1)
    buffers = FLOAT * BUCKET_ELEMENTS if ranks > 1 else 0
    gathered = FLOAT * LIVE_ELEMENTS if stage == 3 else 0
    held = memory.weights + memory.gradients + memory.optimizer - buffers - gathered
    assert held / GIB == pytest.approx(gib, rel=1e-6)


def test_offloading_moves_the_optimizer_to_main_memory(seven):
    memory = train_memory(seven, TrainSection(zero_stage=2, offload_optimizer=True), HALF, ranks=1, tokens=1)
    assert memory.optimizer == 0
    assert memory.host == 12 * PARAMETERS_7B


def test_a_rank_of_70b_loads_its_part_and_two_tensors_unless_transformers_converts_the_weights(seventy):
    settings = {"ranks": 64, "tokens": 4096, "checkpointing": True}
    memory = train_memory(seventy, TrainSection(zero_stage=3), HALF, **settings)
    assert (memory.loading, memory.host) == (0, 2 * 4 * 32000 * 8192)
    converted = train_memory(replace(seventy, converted=True), TrainSection(zero_stage=3), HALF, **settings)
    assert converted.total >= 4 * PARAMETERS_70B
    assert converted.host == 4 * PARAMETERS_70B


@pytest.mark.parametrize(
    ("sizes", "parameters", "full", "adapted"),
    [
        # Of weights, gradients and moments: 20 bytes a parameter over the ranks; of a bfloat16 base 2, and 20 of its adapters.
        (LLAMA_7B, 6_738_415_616, (15.69, 7.84, 1.96), (1.66, 0.83, 0.21)),
        (QWEN_32B, 32_763_417_600, (76.28, 38.14, 9.54), (7.94, 3.97, 0.99)),
        (LLAMA_70B, 68_976_648_192, (160.60, 80.30, 20.07), (16.54, 8.27, 2.07)),
    ],
)
def test_a_rank_of_8_gpus_on_1_2_and_8_nodes_holds_its_share(tmp_path, sizes, parameters, full, adapted):
    folder = write_model(tmp_path / "model", sizes | {"dtype": "bfloat16"})
    for lora, wanted in ((None, full), (LoraSection(rank=16), adapted)):
        shape = read_shape(ModelSection(path=str(folder), lora=lora))
        assert shape.parameters == parameters
        for nodes, gib in zip((1, 2, 8), wanted, strict=True):
            memory = train_memory(shape, TrainSection(zero_stage=3), HALF, ranks=8 * nodes, tokens=1)
            everything = parameters + (shape.trainable if lora else 0)
            whole = shape.frozen_bytes + FLOAT * shape.trainable if lora else FLOAT * parameters
            rounded = 0 if lora else 2 * min(shape.linear, LIVE_ELEMENTS)
            buffers = (
                FLOAT * min(BUCKET_ELEMENTS, shape.trainable) + rounded + whole * min(LIVE_ELEMENTS, everything) // everything
            )
            held = memory.weights + memory.gradients + memory.optimizer - buffers
            assert held / GIB == pytest.approx(gib, abs=0.02)
            assert memory.loading == 0


def test_a_7b_base_of_adapters_takes_its_checkpoints_13_gibibytes(tmp_path):
    folder = write_model(tmp_path / "model", LLAMA_7B | {"dtype": "bfloat16"})
    shape = read_shape(ModelSection(path=str(folder), lora=LoraSection(rank=8, target_modules=["q_proj", "v_proj"])))
    memory = train_memory(shape, TrainSection(), HALF, ranks=1, tokens=1)
    assert memory.weights == 2 * PARAMETERS_7B + 2 * (2 * 32 + 1) * 4096 + 4 * 4_194_304  # norms stay float32
    assert memory.weights / GIB == pytest.approx(12.57, abs=0.01)


def test_keys_and_values_are_the_published_half_mebibyte_a_token_at_7b_and_grouped_at_70b(seven, seventy):
    assert cache_bytes_per_token(seven, HALF) == 2**19
    assert cache_bytes_per_token(seventy, HALF) == 2 * 80 * 8 * 128 * 2


def test_a_frozen_7b_in_bfloat16_holds_two_bytes_a_linear_weight_and_four_elsewhere(seven):
    assert frozen_memory(seven, HALF, tokens=1).weights == 2 * seven.linear + 4 * (PARAMETERS_7B - seven.linear)
    stored = replace(seven, stored=2)
    assert frozen_memory(stored, FULL, tokens=1).weights == 2 * PARAMETERS_7B + 2 * (2 * 32 + 1) * 4096


def test_a_weight_sync_of_70b_moves_128_gibibytes_in_bfloat16(seventy):
    assert sync_bytes(seventy, HALF) / GIB == pytest.approx(128.5, abs=0.1)


def test_a_chunk_of_logits_adds_its_buffers(seven):
    small, large = (train_memory(seven, TrainSection(), HALF, ranks=1, tokens=2**14, chunk=chunk) for chunk in (2**20, 2**24))
    assert large.activations - small.activations == LOGIT_BUFFERS * (2**24 - 2**20)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [None, LoraSection(rank=4)])
def test_trained_models_hold_the_weights_that_the_plan_counts(tmp_path, stored, stage, lora):
    join_alone()
    folder = str(store(write_llama(tmp_path / "model", vocabulary=259), stored))
    section = ModelSection(path=folder, dtype="float32", lora=lora)
    for heads in (frozenset({"lm"}), frozenset({"value"})):
        train = TrainSection(zero_stage=stage)
        engine = TrainEngine(TrainEngineSpec(section, heads, train, 1e-3))
        held = sum(getattr(one, "ds_tensor", one).nbytes for one in engine._network.parameters())
        shape = replace(read_shape(section), stored=stored.itemsize)  # its configuration says bfloat16 in both cases
        planned = train_memory(shape, train, FULL, ranks=1, tokens=1, language="lm" in heads).weights
        assert held == pytest.approx(planned, rel=0.05)
        assert (
            held < planned * 1.05 < sum(4 * getattr(one, "ds_numel", one.numel()) for one in engine._network.parameters()) * 1.1
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frozen_models_hold_the_weights_that_the_plan_counts(tmp_path, dtype):
    from rayrlhf.engines.scoring.frozen import FrozenEngine
    from rayrlhf.engines.scoring.reward_model import RewardModelEngine
    from rayrlhf.tools.bench.ppo_step import write_reward_model

    policy, reward = write_reward_model("builtin:tiny?layers=2&hidden=128&context=64", tmp_path / "reward")
    section = RewardModelSection(model=ModelSection(path=reward, dtype=dtype), template="{prompt}{response}")
    planned = frozen_memory(read_shape(ModelSection(path=policy)), HALF if dtype == "bfloat16" else FULL, tokens=1).weights
    reference = FrozenEngine(ModelSection(path=policy, dtype=dtype), 1024)
    for network in (reference._network, RewardModelEngine(section)._scorer.network):
        held = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        assert held == pytest.approx(planned, rel=0.02)


def tiny(hidden, layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            head_dim=64,
            tie_word_embeddings=True,
        )
    )


def saved_bytes(network, tokens, dtype, checkpointing):
    """Bytes of activations that autograd keeps after a forward, each storage once, without weights and their rounded copies."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    shapes = {tuple(parameter.shape) for parameter in network.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    if checkpointing:
        network.gradient_checkpointing_enable()
        network.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        output = network.model(input_ids=torch.zeros(tokens // 64, 64, dtype=torch.long), use_cache=False)
    del output
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "layers"), [(128, 2), (256, 4)])
def test_activations_are_within_5_percent_of_what_autograd_keeps_and_so_is_their_growth(hidden, layers, dtype):
    network = tiny(hidden, layers)
    shape, precision = shape_of(network), Precision(dtype.itemsize)
    measured = {tokens: saved_bytes(network, tokens, dtype, False) for tokens in (512, 1024)}
    expected = {tokens: activation_bytes(shape, tokens, precision, checkpointing=False) for tokens in measured}
    assert expected == pytest.approx(measured, rel=0.05)
    assert expected[1024] - expected[512] == pytest.approx(measured[1024] - measured[512], rel=0.05)


@pytest.mark.parametrize(("hidden", "layers"), [(128, 2), (256, 4)])
def test_with_checkpointing_layers_keep_their_inputs_only_and_one_is_recomputed(hidden, layers):
    network = tiny(hidden, layers)
    shape = shape_of(network)
    kept = saved_bytes(network, 1024, torch.float32, True)
    one_layer = activation_bytes(shape, 1024, FULL, checkpointing=False) - 1024 * 2 * FLOAT * hidden
    expected = activation_bytes(shape, 1024, FULL, checkpointing=True) - one_layer // layers
    assert expected == pytest.approx(kept, rel=0.05)
