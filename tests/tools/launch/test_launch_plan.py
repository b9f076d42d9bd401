"""Where processes land on simulated clusters, what does not fit, and the change that makes it fit."""

import re
import time

import pytest

from rayrlhf.actors.placement import ClusterResources, GroupPlan, ResourcePlan, WorkerPlacement, make_plan
from rayrlhf.config.launch import NodeSection
from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.tools.launch.launch_plan import plan_run
from rayrlhf.tools.launch.remedy import _single, advice, find_remedy, fits
from rayrlhf.tools.launch.role_layout import lay_out
from tests.tools.launch.models import LLAMA_7B, LLAMA_70B, MIXTRAL, ppo, write_model

EIGHT = NodeSection(count=8, gpus=8, cpus=96)
MACHINE = ClusterResources((96.0,) * 8, (8.0,) * 8)
DISAGGREGATED = "placement.mode=disaggregated"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    write_model(path / "7b", LLAMA_7B)
    write_model(path / "70b", LLAMA_70B)
    return path


def places(config, role):
    return [place for place in lay_out(make_plan(config, MACHINE), MACHINE) if place.role == role]


def test_disaggregated_roles_fill_node_after_node_and_share_no_device(folder):
    ranks = ["placement.policy.ranks=16", "placement.critic.ranks=16", "placement.reference.ranks=8", "rollout.replicas=16"]
    config = ppo(folder / "7b", DISAGGREGATED, *ranks)
    laid = lay_out(make_plan(config, MACHINE), MACHINE)
    used = [(place.node, device) for place in laid for device in place.devices]
    assert len(used) == len(set(used)) == 56
    assert [place.node for place in places(config, "policy")] == [0] * 8 + [1] * 8
    assert {place.node for place in places(config, "rollout")} == {5, 6}


def test_a_tensor_parallel_replica_never_crosses_nodes(folder):
    config = ppo(
        folder / "7b", DISAGGREGATED, "placement.policy.ranks=6", "rollout.replicas=3", "rollout.tensor_parallel_size=4"
    )
    for place in places(config, "rollout"):
        assert len(place.devices) == 4
    assert len({(place.node, device) for place in places(config, "rollout") for device in place.devices}) == 12


def test_a_replica_over_several_nodes_has_the_devices_of_a_bundle_on_each(folder):
    sizes = ["rollout.replicas=2", "rollout.tensor_parallel_size=4", "rollout.pipeline_parallel_size=4"]
    laid = places(ppo(folder / "7b", DISAGGREGATED, *sizes), "rollout")
    assert [(place.rank, len(place.devices)) for place in laid] == [(0, 8), (0, 8), (1, 8), (1, 8)]
    assert len({place.node for place in laid}) == 4


@pytest.mark.parametrize("stages", [2, 3])
def test_a_stage_holds_its_layers_and_one_end_of_the_model(folder, stages):
    """32 layers: of three stages the largest has 11."""
    one, cut = (
        plan_run(
            ppo(folder / "7b", DISAGGREGATED, "rollout.tensor_parallel_size=4", f"rollout.pipeline_parallel_size={size}"),
            NodeSection(count=4, gpus=8, cpus=96, gpu_memory_gib=40),
        )
        for size in (1, stages)
    )
    ends, layers = 32000 * 4096, -(-32 // stages)
    inner = one.memory["rollout"].weights * 4 // 2 - 2 * ends
    assert cut.memory["rollout"].weights == pytest.approx(2 * (inner * layers / 32 + ends) / 4, rel=1e-6)
    token = 2 * 4096 * 2
    assert cut.memory["rollout"].cache == pytest.approx(cut.cache_tokens * token * layers / 4, rel=1e-4)
    assert cut.memory["rollout"].total == pytest.approx(0.5 * 40 * GIB, rel=1e-6)
    assert (one.cache_tokens, cut.cache_tokens) == pytest.approx(
        ((4 * one.memory["rollout"].cache) / (token * 32), (4 * cut.memory["rollout"].cache) / (token * layers)), rel=1e-4
    )


def test_colocated_roles_share_the_device_of_their_rank(folder):
    ranks = [f"placement.{role}.ranks=8" for role in ("policy", "critic", "reference")]
    config = ppo(folder / "7b", *ranks, "rollout.replicas=8")
    for role in ("policy", "critic", "reference", "rollout"):
        assert [place.devices for place in places(config, role)] == [(device,) for device in range(8)]


def test_roles_with_labels_keep_to_nodes_of_their_own_and_others_sit_anywhere(folder):
    labels = ["placement.policy.labels={rayrlhf/role: train}", "placement.rollout_labels={rayrlhf/role: rollout}"]
    config = ppo(folder / "7b", DISAGGREGATED, *labels)
    assert {place.node for place in places(config, "policy")} == {0}
    assert {place.node for place in places(config, "rollout")} == {1}
    assert {place.node for place in places(config, "critic")} == {0}
    assert make_plan(config, MACHINE).groups["policy"].labels == {"rayrlhf/role": "train"}


@pytest.mark.parametrize("key", ["placement.policy.labels", "placement.rollout_labels"])
def test_labels_are_refused_where_roles_share_bundles(folder, key):
    with pytest.raises(UserError, match="disaggregated"):
        ppo(folder / "7b", f"{key}={{rayrlhf/role: train}}")


def test_a_bundle_larger_than_any_node_is_refused_before_a_cluster_would_wait_for_it(folder):
    with pytest.raises(UserError, match=r"up to 32 CPUs .*node 1: 16 CPUs"):
        plan_run(ppo("builtin:tiny"), NodeSection(count=2, cpus=16))


def test_a_group_that_must_stay_together_and_cannot_is_refused_with_what_is_left():
    workers = {"rollout": (WorkerPlacement("rollout-0", (0, 1, 2), 1.0, 1.0, 1),)}
    plan = ResourcePlan({"rollout-0": GroupPlan("STRICT_PACK", ({"CPU": 1.0, "GPU": 1.0},) * 3)}, workers, overlap=False)
    with pytest.raises(UserError, match=r"3 times up to 1 CPUs and 1 GPUs on one node.*node 1: 4 CPUs, 2 GPUs"):
        lay_out(plan, ClusterResources((4.0, 4.0), (2.0, 2.0)))


def test_too_few_gpus_are_refused_at_once_with_asked_against_available(folder):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"requested .* 100 GPUs .*has 768 CPUs and 64 GPUs"):
        plan_run(ppo(folder / "7b", "placement.policy.ranks=100"), EIGHT)
    assert time.monotonic() - started < 5


def test_7b_does_not_fit_one_gpu_and_the_lines_say_by_how_much_and_for_whom(folder):
    plan = plan_run(ppo(folder / "7b"), NodeSection(gpus=1, cpus=16))
    (problem,) = plan.problems
    assert "node 0 GPU 0" in problem
    assert "76.0 GiB" in problem
    assert "critic" in problem
    assert any(line.startswith("does not fit: node 0 GPU 0") for line in plan.lines())


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_suggested_makes_it_fit_and_no_part_of_it_can_be_left_out(folder, count):
    config, nodes = ppo(folder / "7b"), NodeSection(count=count, gpus=8, cpus=96)
    remedy = find_remedy(config, nodes)
    cluster = nodes.model_copy(update={"count": remedy.nodes})
    assert fits(config, cluster, remedy.overrides)
    for setting in remedy.overrides:
        if "ranks" not in setting:
            assert not fits(config, cluster, tuple(other for other in remedy.overrides if other != setting))


def test_a_cache_that_holds_no_sample_is_told_and_cured_by_more_of_the_device(folder):
    config = ppo(folder / "7b", DISAGGREGATED, "model.lora={}", "critic.kind=shared", "rollout.gpu_memory_utilization=0.18")
    nodes = NodeSection(gpus=4, cpus=96)
    assert any("KV cache holds" in problem for problem in plan_run(config, nodes).problems)
    (setting,) = find_remedy(config, nodes).overrides
    assert setting.startswith("rollout.gpu_memory_utilization=")


def test_weights_that_are_converted_whole_are_refused_for_the_reason_that_no_setting_can_cure(folder, monkeypatch):
    started = time.monotonic()
    experts = {"model_type": "mixtral", "num_local_experts": 8}
    model = write_model(folder / "experts", LLAMA_7B | experts)
    monkeypatch.setattr("rayrlhf.models.stacked_weights.only_stacks", lambda _: False)
    line = advice(ppo(model, "train.zero_stage=3", "placement.policy.ranks=64"), EIGHT)
    assert line.startswith("no setting helps: each rank of the policy loads the whole model before it is sharded: 138.0 of 76")
    assert time.monotonic() - started < 5


def test_stacked_experts_are_planned_as_read_one_tensor_at_a_time(folder):
    model = write_model(folder / "mixtral", LLAMA_7B | {"model_type": "mixtral", "num_local_experts": 8})
    config = ppo(model, "train.zero_stage=3", "placement.policy.ranks=64")
    assert plan_run(config, EIGHT).memory["policy"].total < 40 * GIB  # the whole model is 138 GiB


def test_the_sync_crosses_the_network_once_for_each_other_node_with_a_replica(folder):
    config = ppo(folder / "7b", DISAGGREGATED, "placement.policy.ranks=8", "rollout.replicas=8")
    lines = list(plan_run(config, EIGHT).lines())
    (sync,) = [line for line in lines if line.startswith("weight sync")]
    assert sync == "weight sync: 12.55 GiB into each of 2 nodes, 25.10 GiB over the network"


def test_a_tiny_run_fits_a_laptop():
    plan = plan_run(ppo("builtin:tiny"), NodeSection(cpus=2, memory_gib=16))
    assert plan.problems == ()
    assert {place.node for place in plan.places} == {0}


def test_members_of_a_reward_ensemble_share_a_process_and_their_weights_add_up(folder):
    member = f"path: {folder / '7b'}, dtype: bfloat16"
    one = plan_run(ppo(folder / "7b", f"reward.model={{model: {{{member}}}}}"), EIGHT).memory["reward"]
    members = f"members: [{{{member}}}, {{{member}}}]"
    three = plan_run(ppo(folder / "7b", f"reward.model={{model: {{{member}}}, {members}}}"), EIGHT).memory["reward"]
    assert three.weights == 3 * one.weights
    assert three.total - one.total == 2 * one.weights
    pooled = plan_run(ppo(folder / "7b", f"reward.model={{model: {{{member}}}, backend: vllm, kv_cache_gib: 2}}"), EIGHT)
    assert (one.cache, pooled.memory["reward"].cache) == (0, 2 * GIB)
    assert 0.9 * one.weights < pooled.memory["reward"].weights <= one.weights


def test_of_models_that_wait_in_main_memory_a_device_holds_the_largest_and_no_more(folder):
    settings = [
        "placement.policy.ranks=8",
        "placement.critic.ranks=8",
        "placement.reference.ranks=8",
        "rollout.replicas=8",
        f"reward.model={{model: {{path: {folder / '7b'}}}, template: '{{response}}'}}",
        "placement.reward.ranks=8",
        "train.zero_stage=3",
    ]
    small = NodeSection(count=1, gpus=8, cpus=96, gpu_memory_gib=10)

    def needed(*more):
        found = [line for line in plan_run(ppo(folder / "7b", *settings, *more), small).problems if "GPU 0" in line]
        return float(found[0].split(": ")[1].split(" of")[0])

    plan = plan_run(ppo(folder / "7b", *settings), small)
    one = (plan.memory["reference"].weights + plan.memory["reference"].activations) / 2**30
    assert needed() - needed("reference.offload=true") == pytest.approx(0, abs=0.15)
    assert needed() - needed("reference.offload=true", "reward.model.offload=true") == pytest.approx(one, abs=0.15)


def test_a_replica_too_large_for_a_node_is_split_into_stages(folder):
    config = ppo(
        folder / "70b", DISAGGREGATED, "model.lora={rank: 16}", "model.gradient_checkpointing=true", "train.zero_stage=3",
        "placement.policy.ranks=16", "critic.kind=shared", "algorithm.kl.coefficient=0", "train.micro_batch_tokens=512",
        "rollout.tensor_parallel_size=4", "rollout.replicas=1", "rollout.gpu_memory_utilization=0.9",
    )  # fmt: skip
    nodes = NodeSection(count=6, gpus=4, cpus=96, gpu_memory_gib=32)
    assert advice(config, nodes) == "smallest change that fits: rollout.pipeline_parallel_size=2"


def test_offloading_is_among_the_remedies_where_it_is_what_helps(folder):
    plain = ppo(folder / "7b", "placement.policy.ranks=8", "placement.critic.ranks=8", "placement.reference.ranks=8")
    assert "reference.offload=true" in list(_single(plain, EIGHT))
    assert "reference.offload=true" not in list(_single(plain, NodeSection(count=1, gpus=0, cpus=8)))


def test_members_that_wait_take_the_host_all_together_and_the_device_one_at_a_time(folder):
    member = f"path: {folder / '7b'}, dtype: bfloat16"
    one = plan_run(ppo(folder / "7b", f"reward.model={{model: {{{member}}}}}"), EIGHT).memory["reward"]
    waiting = f"reward.model={{model: {{{member}}}, members: [{{{member}}}], offload: true}}"
    two = plan_run(ppo(folder / "7b", waiting), EIGHT).memory["reward"]
    assert two.total == one.total
    assert two.by_turns == one.weights + one.activations
    assert two.host == 2 * one.host


@pytest.mark.parametrize("preset", ["xpo", "nash-md"])
def test_a_replica_that_samples_the_opponent_counts_its_reference_too(folder, preset):
    own = plan_run(ppo(folder / "7b", "preset=online-dpo", "rollout.backend=transformers"), EIGHT).memory["rollout"]
    found = plan_run(ppo(folder / "7b", f"preset={preset}"), EIGHT).memory["rollout"]
    assert found.weights == 2 * own.weights
    larger = plan_run(ppo(folder / "7b", f"preset={preset}", f"reference.model.path={folder / '70b'}"), EIGHT).memory["rollout"]
    assert 9 < larger.weights / own.weights < 12


def test_a_judges_replicas_are_placed_and_counted(folder):
    judge = f"reward.judge={{model: {{path: {folder / '7b'}, dtype: bfloat16}}, replicas: 2, tensor_parallel_size: 2"
    plan = plan_run(ppo(folder / "7b", DISAGGREGATED, judge + ", gpu_memory_utilization: 0.5}"), EIGHT)
    assert [len(place.devices) for place in plan.places if place.role == "judge"] == [2, 2]
    assert plan.memory["judge"].total == pytest.approx(0.5 * EIGHT.gpu_memory_gib * 2**30, rel=1e-3)


@pytest.mark.parametrize(
    ("share", "context", "length", "problem"),
    [
        (0.05, 4096, "", "a judge's KV cache holds 0 tokens, a question may have 4096 "),
        (0.3, 262_144, "", r"a judge's KV cache holds \d{5} tokens, a question may have 262144 "),
        (0.3, 262_144, ", max_model_length: 8192", None),
    ],
)
def test_a_judges_cache_holds_its_longest_question(folder, share, context, length, problem):
    model = write_model(folder / f"judge-{context}", LLAMA_7B | {"max_position_embeddings": context})
    judge = f"reward.judge={{model: {{path: {model}, dtype: bfloat16}}, gpu_memory_utilization: {share}{length}}}"
    plan = plan_run(ppo(folder / "7b", DISAGGREGATED, judge), EIGHT)
    found = [line for line in plan.problems if "judge" in line]
    assert len(found) == (problem is not None)
    assert all(re.match(problem, line) and "reward.judge.gpu_memory_utilization" in line for line in found)


def test_ranks_that_share_rows_hold_their_part_of_the_activations(folder):
    ranks = [f"placement.{role}.ranks=8" for role in ("policy", "critic", "reference")]
    long = ["rollout.replicas=8", "rollout.max_new_tokens=3000", "train.mini_batch_size=64", *ranks]
    whole = plan_run(ppo(folder / "7b", *long), EIGHT)
    split = plan_run(ppo(folder / "7b", *long, "placement.policy.sequence_parallel=4"), EIGHT)
    (line,) = (line for line in split.lines() if line.startswith("policy: "))
    assert line.endswith("rows split over 4")
    assert not any("rows split" in line for line in whole.lines())
    assert split.memory["critic"] == whole.memory["critic"]
    before, after = whole.memory["policy"], split.memory["policy"]
    assert (after.weights, after.gradients, after.optimizer) == (before.weights, before.gradients, before.optimizer)
    fixed = 2 * 32000 * 4096  # the output layer, which rows do not change; all logits fit into one chunk
    assert (before.activations - fixed) / (after.activations - fixed) == pytest.approx(4, rel=1e-3)


def test_ranks_that_share_weights_hold_their_part_of_layers_and_vocabulary_and_load_the_whole(folder):
    ranks = [f"placement.{role}.ranks=8" for role in ("policy", "critic", "reference")]
    whole = plan_run(ppo(folder / "7b", "rollout.replicas=8", *ranks), EIGHT)
    cut = plan_run(ppo(folder / "7b", "rollout.replicas=8", *ranks, "placement.policy.tensor_parallel=4"), EIGHT)
    (line,) = (line for line in cut.lines() if line.startswith("policy: "))
    assert line.endswith("weights split over 4")
    assert cut.memory["critic"] == whole.memory["critic"]
    before, after = whole.memory["policy"], cut.memory["policy"]
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rows, norms = 2 * 32000 * 4096, 65 * 4096
    assert before.optimizer == 8 * (linear + rows + norms)
    assert after.optimizer == 8 * ((linear + rows) // 4 + norms)
    assert after.host == 4 * (linear + rows + norms)
    assert after.loading == 0
    assert after.total < before.total / 2


def test_ranks_that_share_experts_hold_their_part_of_them(tmp_path):
    model = write_model(tmp_path / "moe", MIXTRAL)
    whole = plan_run(ppo(model, "placement.policy.ranks=4"), EIGHT)
    cut = plan_run(ppo(model, "placement.policy={ranks: 4, expert_parallel: 4}"), EIGHT)
    (line,) = (line for line in cut.lines() if line.startswith("policy: "))
    assert line.endswith("experts split over 4")
    experts = MIXTRAL["num_hidden_layers"] * 8 * 3 * MIXTRAL["hidden_size"] * MIXTRAL["intermediate_size"]
    for part, numbers in (("weights", 1), ("optimizer", 2)):
        before, after = (getattr(plan.memory["policy"], part) for plan in (whole, cut))
        assert before - after == 4 * numbers * experts * 3 // 4
    with pytest.raises(
        UserError, match=r"placement\.policy\.expert_parallel 3: a mixtral .* has 8 experts; expected a divisor"
    ):
        plan_run(ppo(model, "placement.policy={ranks: 3, expert_parallel: 3}"), EIGHT)


def test_zero_3_divides_shared_weights_over_all_ranks(folder, tmp_path):
    mixtral = write_model(tmp_path / "moe", MIXTRAL)
    for model, key in ((folder / "7b", "tensor_parallel"), (mixtral, "expert_parallel")):
        settings = ["placement.policy.ranks=8", "train.zero_stage=3"]
        whole, cut = (
            plan_run(ppo(model, *settings, *more), EIGHT).memory["policy"] for more in ([], [f"placement.policy.{key}=4"])
        )
        assert cut.optimizer == whole.optimizer
        assert (cut.host, cut.loading) == (whole.host, 0)
        assert cut.weights <= whole.weights


def test_a_plan_refuses_to_split_weights_that_ranks_do_not_divide(folder):
    with pytest.raises(UserError, match=r"placement\.policy\.tensor_parallel 3: a llama .* 32 heads and 32 key heads"):
        plan_run(ppo(folder / "7b", "placement.policy={ranks: 3, tensor_parallel: 3}"), EIGHT)


def test_a_plan_refuses_to_split_rows_that_a_model_needs_whole(folder):
    windowed = write_model(folder / "windowed", LLAMA_7B | {"model_type": "mistral", "sliding_window": 512})
    with pytest.raises(UserError, match=r"placement\.policy\.sequence_parallel 2: a mistral model .* has sliding-window"):
        plan_run(ppo(windowed, "placement.policy={ranks: 2, sequence_parallel: 2}"), EIGHT)


def test_long_rows_that_do_not_fit_are_split(folder):
    long = write_model(folder / "long", LLAMA_7B | {"max_position_embeddings": 131072})
    config = ppo(
        long, DISAGGREGATED, "rollout.max_new_tokens=120000", "rollout.prompts_per_step=8", "train.zero_stage=3",
        "train.offload_optimizer=true", "model.gradient_checkpointing=true", "placement.policy.ranks=8",
        "placement.critic.ranks=8", "algorithm.kl.coefficient=0", "rollout.replicas=1", "rollout.tensor_parallel_size=8",
        "train.micro_batch_tokens=256",
    )  # fmt: skip
    split = "placement.policy.sequence_parallel=2 placement.critic.sequence_parallel=2"
    assert advice(config, EIGHT) == f"smallest change that fits: {split}"
