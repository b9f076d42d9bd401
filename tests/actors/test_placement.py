"""Placement is a pure function, so it is tested as a table: machine and config in, seats out."""

import pytest

from rayrlhf.actors.placement import ClusterResources, building_order, make_plan, nodes_of_replica, replica_group
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError

LAPTOP = ClusterResources((2.0,), (0.0,))
CLUSTER = ClusterResources((96.0,) * 8, (8.0,) * 8)
DISAGGREGATED = {"mode": "disaggregated"}


def config(**sections):
    base = {
        "model": {"path": "builtin:tiny"},
        "reward": {"functions": [{"name": "length"}]},
        "data": {"train": {"path": "prompts.jsonl"}},
    }
    return PPOConfig.model_validate(base | sections)


def test_a_laptop_places_all_five_roles_by_fractions_of_its_two_cores():
    plan = make_plan(config(), LAPTOP)
    assert set(plan.workers) == {"policy", "critic", "reference", "reward", "rollout"}
    assert sum(worker.cpus for workers in plan.workers.values() for worker in workers) <= 2.0
    assert {worker.group for workers in plan.workers.values() for worker in workers} == {"colocated"}


def test_roles_that_share_cores_take_turns_with_all_of_them():
    plan = make_plan(config(), LAPTOP)
    assert not plan.overlap
    assert {worker.threads for workers in plan.workers.values() for worker in workers} == {2}


def test_roles_that_the_objective_does_not_need_are_not_started():
    no_kl = config(algorithm={"kl": {"coefficient": 0}}, critic={"kind": "shared"})
    assert set(make_plan(no_kl, LAPTOP).workers) == {"policy", "reward", "rollout"}
    lora = config(model={"path": "builtin:tiny", "lora": {}})
    assert "reference" not in make_plan(lora, LAPTOP).workers


def test_colocated_gpu_roles_share_each_device_and_never_exceed_it():
    location = {role: {"ranks": 8} for role in ("policy", "critic", "reference")}
    plan = make_plan(config(placement=location, rollout={"replicas": 8}), CLUSTER)
    for bundle in range(8):
        sharers = [worker for workers in plan.workers.values() for worker in workers if worker.bundles == (bundle,)]
        assert 0 < sum(worker.gpus for worker in sharers) <= 1.0
    assert plan.workers["reward"][0].gpus == 0


def test_disaggregated_roles_get_groups_of_their_own_and_overlap():
    plan = make_plan(config(placement={"mode": "disaggregated", "policy": {"ranks": 4}}), CLUSTER)
    assert set(plan.groups) == {"policy", "critic", "reference", "reward", "rollout-0"}
    assert [worker.gpus for worker in plan.workers["policy"]] == [1.0] * 4
    assert plan.overlap


@pytest.mark.parametrize("mode", ["colocated", "disaggregated"])
def test_the_process_of_a_tensor_parallel_replica_holds_its_gpus_in_one_bundle_of_its_own(mode):
    plan = make_plan(config(placement={"mode": mode}, rollout={"replicas": 2, "tensor_parallel_size": 4}), CLUSTER)
    for index in range(2):
        assert plan.groups[f"rollout-{index}"].bundles == ({"CPU": 4.0, "GPU": 4},)
        worker = plan.workers["rollout"][index]
        assert (worker.bundles, worker.cpus, worker.gpus) == ((0,), 4.0, 4.0)
    assert replica_group(plan).bundles == ({"CPU": 4.0, "GPU": 4},)


def test_a_tensor_parallel_replica_on_cpus_has_a_share_of_them_for_each_worker():
    plan = make_plan(config(rollout={"tensor_parallel_size": 2}), LAPTOP)
    assert plan.workers["rollout"][0].cpus == pytest.approx(2 * plan.workers["policy"][0].cpus)
    assert plan.groups["rollout-0"].bundles == ({"CPU": plan.workers["rollout"][0].cpus},)


def test_a_share_of_gpus_that_are_not_those_of_the_tensor_parallel_size_is_refused():
    sections = {"rollout": {"tensor_parallel_size": 2}, "placement": {"rollout_gpus": 0.5}}
    with pytest.raises(UserError, match=r"placement.rollout_gpus: a replica takes whole GPUs, expected 2 .*, found 0.5"):
        make_plan(config(**sections), CLUSTER)


@pytest.mark.parametrize(
    ("stages", "gpus", "node_gpus", "nodes"),
    [
        (1, 8, (8, 8), 1),
        (1, 16, (8, 8), 1),  # refused as a whole
        (2, 8, (8, 8), 1),
        (2, 16, (8, 8), 2),
        (4, 32, (8,) * 8, 4),
        (4, 16, (8, 8, 8), 2),
        (3, 12, (8, 8), 3),  # two of the stages share a node
        (4, 16, (8, 4, 4), 4),
        (6, 12, (6, 4, 4), 3),
        (2, 16, (8, 4, 4), None),
        (4, 16, (6, 6), None),
    ],
)
def test_a_replica_gets_the_fewest_nodes_that_hold_its_stages_whole(stages, gpus, node_gpus, nodes):
    machine = ClusterResources((64.0,) * len(node_gpus), tuple(map(float, node_gpus)))
    if nodes is not None:
        assert nodes_of_replica(stages, gpus, gpus, machine) == nodes
        return
    with pytest.raises(
        UserError, match=rf"^rollout.pipeline_parallel_size {stages}: .* {gpus // stages} GPUs, each whole on a"
    ):
        nodes_of_replica(stages, gpus, gpus, machine)


def test_a_replica_over_several_nodes_has_a_bundle_and_a_process_on_each():
    sections = {"rollout": {"replicas": 2, "tensor_parallel_size": 8, "pipeline_parallel_size": 2}}
    plan = make_plan(config(**sections, placement=DISAGGREGATED), CLUSTER)
    for index in range(2):
        group, worker = plan.groups[f"rollout-{index}"], plan.workers["rollout"][index]
        assert (group.strategy, group.bundles) == ("PACK", ({"CPU": 8.0, "GPU": 8},) * 2)
        assert (worker.bundles, worker.cpus, worker.gpus) == ((0, 1), 8.0, 8.0)
    assert replica_group(plan) == plan.groups["rollout-0"]
    specs = RoleSpecs(config(**sections, placement=DISAGGREGATED), plan)
    assert specs.rollout().node.count == 2
    assert specs.weight_transfer == "nccl"
    assert int(specs.environment("rollout")["OMP_NUM_THREADS"]) == plan.workers["rollout"][0].threads // 8


def test_a_replica_of_several_stages_that_fits_on_one_node_has_one_bundle_there():
    plan = make_plan(config(rollout={"tensor_parallel_size": 2, "pipeline_parallel_size": 4}), CLUSTER)
    assert plan.groups["rollout-0"].strategy == "STRICT_PACK"
    assert plan.groups["rollout-0"].bundles == ({"CPU": 8.0, "GPU": 8},)
    on_cpus = config(rollout={"pipeline_parallel_size": 2}, placement={"rollout_cpus": 3})
    assert make_plan(on_cpus, ClusterResources((4.0,) * 3, (0.0,) * 3)).groups["rollout-0"].bundles == ({"CPU": 3.0},)
    assert make_plan(on_cpus, ClusterResources((2.0,) * 5, (0.0,) * 5)).groups["rollout-0"].bundles == ({"CPU": 1.5},) * 2


def test_adapters_of_a_replica_of_several_stages_are_merged():
    lora = {"path": "builtin:tiny", "lora": {}, "dtype": "bfloat16"}
    for stages, adapters in ((1, True), (2, False)):
        pair = config(model=lora, rollout={"pipeline_parallel_size": stages})
        assert RoleSpecs(pair, make_plan(pair, CLUSTER)).serves_adapters is adapters


@pytest.mark.parametrize(
    ("sections", "cpus", "expected"),
    [
        ({}, 64.0, {"policy": 16, "rollout": 16}),  # in turn
        ({}, 8.0, {"policy": 8, "rollout": 8}),
        ({"placement": {"mode": "disaggregated"}}, 64.0, {"policy": 12, "rollout": 12}),  # five at a time
        ({"placement": {"policy": {"ranks": 8}}, "rollout": {"replicas": 8}}, 64.0, {"policy": 8, "rollout": 8}),
        ({"rollout": {"tensor_parallel_size": 2}}, 64.0, {"policy": 16, "rollout": 32}),  # for both workers
        ({"placement": {"policy": {"threads": 3}}}, 64.0, {"policy": 3}),
        ({"placement": {"policy": {"cpus": 32}}}, 64.0, {"policy": 32}),
    ],
)
def test_processes_on_gpus_share_the_cpus_of_their_node(sections, cpus, expected):
    workers = make_plan(config(**sections), ClusterResources((cpus,), (8.0,))).workers
    assert {role: workers[role][0].threads for role in expected} == expected


def test_exact_runs_never_overlap():
    plan = make_plan(config(run={"determinism": "exact"}, placement={"mode": "disaggregated", "overlap": "on"}), CLUSTER)
    assert not plan.overlap


def test_too_little_hardware_says_what_is_asked_and_what_is_there():
    with pytest.raises(UserError, match=r"requested 17 CPUs .*policy 4 x \(4 CPU, 0 GPU\).* has 2 CPUs and 0 GPUs"):
        make_plan(config(placement={"policy": {"ranks": 4, "cpus": 4}}), LAPTOP)
    with pytest.raises(UserError, match="the cluster has 2 CPUs and 0 GPUs"):
        make_plan(config(placement={"policy": {"gpus": 1}}), LAPTOP)


def test_a_teacher_has_processes_of_its_own():
    taught = config(teacher={"model": {"path": "builtin:tiny"}}, placement={"teacher": {"ranks": 2}})
    assert len(make_plan(taught, LAPTOP).workers["teacher"]) == 2


JUDGED = {"reward": {"judge": {"model": {"path": "builtin:tiny"}, "replicas": 2, "tensor_parallel_size": 2}}}


def test_a_judge_alone_needs_no_reward_process_and_its_replicas_are_placed_like_those_of_the_policy():
    plan = make_plan(config(**JUDGED, placement=DISAGGREGATED | {"judge": {"cpus": 3}}), CLUSTER)
    assert "reward" not in plan.workers
    assert [plan.groups[f"judge-{index}"].bundles for index in range(2)] == [({"CPU": 3.0, "GPU": 2},)] * 2
    one = config(reward={"judge": {"model": {"path": "builtin:tiny"}}, "functions": [{"name": "length"}]})
    assert {worker.group for worker in make_plan(one, LAPTOP).workers["judge"]} == {"colocated"}
    assert building_order(make_plan(one, CLUSTER).workers)[:2] == [["rollout"], ["judge"]]
    with pytest.raises(
        UserError, match=r"placement.judge.gpus: .* expected 2 \(reward.judge.tensor_parallel_size\), found 0.5"
    ):
        make_plan(config(**JUDGED, placement={"judge": {"gpus": 0.5}}), CLUSTER)


@pytest.mark.parametrize(
    ("sections", "machine", "first"),
    [
        ({}, LAPTOP, {"policy", "critic", "reference", "reward", "rollout"}),
        ({}, CLUSTER, {"rollout"}),  # one GPU for all: vLLM measures it while it is alone
        ({"placement": {"mode": "disaggregated"}}, CLUSTER, {"policy", "critic", "reference", "reward", "rollout"}),
        ({"rollout": {"tensor_parallel_size": 2}}, CLUSTER, {"policy", "critic", "reference", "reward", "rollout"}),
    ],
)
def test_samplers_load_before_those_that_they_share_gpus_with(sections, machine, first):
    workers = make_plan(config(**sections), machine).workers
    order = building_order(workers)
    assert set(order[0]) == first
    assert sorted(role for roles in order for role in roles) == sorted(workers)


@pytest.mark.parametrize(
    ("sections", "machine", "expected"),
    [
        ({}, LAPTOP, "shared_memory"),
        ({}, CLUSTER, "ipc"),
        ({"placement": {"mode": "disaggregated"}}, CLUSTER, "nccl"),
        ({"placement": {"mode": "disaggregated"}}, LAPTOP, "shared_memory"),
        ({"rollout": {"tensor_parallel_size": 2}}, CLUSTER, "nccl"),  # replicas have GPUs of their own
        ({"rollout": {"replicas": 2}}, CLUSTER, "shared_memory"),  # one of them shares no GPU, the other does
        ({"rollout": {"replicas": 2}, "placement": {"policy": {"ranks": 2}}}, CLUSTER, "ipc"),
        ({"placement": {"policy": {"gpus": 0.5}, "critic": {"gpus": 0.5}, "rollout_gpus": 0.5}}, CLUSTER, "shared_memory"),
        ({"placement": DISAGGREGATED | {"policy": {"gpus": 0.5}, "rollout_gpus": 0.5}}, CLUSTER, "shared_memory"),
        ({"placement": DISAGGREGATED | {"policy": {"gpus": 0.5}, "rollout_gpus": 1}}, CLUSTER, "nccl"),
        ({"placement": DISAGGREGATED | {"rollout_gpus": 0.5}, "rollout": {"replicas": 2}}, CLUSTER, "shared_memory"),
        ({"rollout": {"backend": "transformers"}}, CLUSTER, "shared_memory"),
        ({"model": {"path": "builtin:tiny", "lora": {}}}, CLUSTER, "shared_memory"),  # adapters alone
        ({"rollout": {"weight_transfer": "shared_memory"}}, CLUSTER, "shared_memory"),
    ],
)
def test_weights_take_the_fastest_path_that_the_placement_allows(sections, machine, expected):
    settings = config(**sections)
    specs = RoleSpecs(settings, make_plan(settings, machine))
    assert specs.weight_transfer == specs.rollout().rollout.weight_transfer == expected


@pytest.mark.parametrize(
    ("model", "rollout", "machine", "unmerged"),
    [
        ({"lora": None}, {}, CLUSTER, False),
        ({}, {}, CLUSTER, True),
        ({"dtype": "float32"}, {}, CLUSTER, True),
        ({"dtype": "bfloat16"}, {}, LAPTOP, True),
        ({"dtype": "float32"}, {}, LAPTOP, False),  # nothing is rounded, and merged weights sample faster
        ({"dtype": "float32"}, {"lora": "adapter"}, LAPTOP, True),
        ({"dtype": "bfloat16"}, {"lora": "merged"}, LAPTOP, False),
        ({"dtype": "bfloat16"}, {"backend": "transformers"}, LAPTOP, False),
        ({"dtype": "bfloat16"}, {"backend": "plugins.py:Engine"}, LAPTOP, False),
    ],
)
def test_adapters_are_served_unmerged_by_vllm_where_rounding_would_lose_them(model, rollout, machine, unmerged):
    settings = config(model={"path": "builtin:tiny", "lora": {}} | model, rollout=rollout)
    specs = RoleSpecs(settings, make_plan(settings, machine))
    assert specs.serves_adapters == specs.rollout().adapters == unmerged


def test_weights_that_go_from_gpu_to_gpu_need_gpus_at_both_ends():
    sections = {"placement": {"mode": "disaggregated"}, "rollout": {"weight_transfer": "nccl"}}
    assert make_plan(config(**sections), CLUSTER).workers["policy"][0].gpus
    with pytest.raises(UserError, match=r"weight_transfer: 'nccl' needs GPUs, and the policy has none"):
        make_plan(config(**sections), ClusterResources((64.0,), (0.0,)))


def test_ipc_reads_a_policy_ranks_memory_so_each_replica_needs_a_rank_on_its_device():
    ipc = {"replicas": 2, "weight_transfer": "ipc"}
    assert make_plan(config(rollout=ipc, placement={"policy": {"ranks": 2}}), CLUSTER).workers["rollout"][1].bundles == (1,)
    with pytest.raises(UserError, match=r"replica 1 shares no GPU with a policy rank; expected rollout.replicas <="):
        make_plan(config(rollout=ipc), CLUSTER)
    with pytest.raises(UserError, match=r"replica 0 takes 1 GPU and the policy 1, which need more than one device"):
        make_plan(config(rollout=ipc | {"replicas": 1}, placement={"policy": {"gpus": 1}, "rollout_gpus": 1}), CLUSTER)
    with pytest.raises(UserError, match=r"replica 0 shares no GPU with a policy rank"):
        make_plan(config(rollout=ipc | {"replicas": 1, "tensor_parallel_size": 2}), CLUSTER)
