"""Placement is a pure function, so it is tested as a table: machine and config in, seats out."""

import pytest

from rayrlhf.actors.placement import Machine, building_order, make_plan
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError

LAPTOP = Machine((2.0,), (0.0,))
CLUSTER = Machine((96.0,) * 8, (8.0,) * 8)


def config(**sections):
    base = {
        "model": {"path": "builtin:tiny"},
        "reward": {"functions": [{"name": "length"}]},
        "data": {"train": {"path": "prompts.jsonl"}},
    }
    return PPOConfig.model_validate(base | sections)


def test_a_laptop_seats_all_five_roles_by_fractions_of_its_two_cores():
    plan = make_plan(config(), LAPTOP)
    assert set(plan.seats) == {"policy", "critic", "reference", "reward", "rollout"}
    assert sum(seat.cpus for seats in plan.seats.values() for seat in seats) <= 2.0
    assert {seat.group for seats in plan.seats.values() for seat in seats} == {"colocated"}


def test_roles_that_share_cores_take_turns_with_all_of_them():
    plan = make_plan(config(), LAPTOP)
    assert not plan.overlap
    assert {seat.threads for seats in plan.seats.values() for seat in seats} == {2}


def test_roles_that_the_objective_does_not_need_are_not_started():
    no_kl = config(algorithm={"kl": {"coefficient": 0}}, critic={"kind": "shared"})
    assert set(make_plan(no_kl, LAPTOP).seats) == {"policy", "reward", "rollout"}
    lora = config(model={"path": "builtin:tiny", "lora": {}})
    assert "reference" not in make_plan(lora, LAPTOP).seats


def test_colocated_gpu_roles_share_each_device_and_never_exceed_it():
    place = {role: {"ranks": 8} for role in ("policy", "critic", "reference")}
    plan = make_plan(config(placement=place, rollout={"replicas": 8}), CLUSTER)
    for bundle in range(8):
        sharers = [seat for seats in plan.seats.values() for seat in seats if seat.bundles == (bundle,)]
        assert 0 < sum(seat.gpus for seat in sharers) <= 1.0
    assert plan.seats["reward"][0].gpus == 0


def test_disaggregated_roles_get_groups_of_their_own_and_overlap():
    plan = make_plan(config(placement={"mode": "disaggregated", "policy": {"ranks": 4}}), CLUSTER)
    assert set(plan.groups) == {"policy", "critic", "reference", "reward", "rollout-0"}
    assert [seat.gpus for seat in plan.seats["policy"]] == [1.0] * 4
    assert plan.overlap


@pytest.mark.parametrize("mode", ["colocated", "disaggregated"])
def test_a_tensor_parallel_replica_is_packed_on_one_node_in_a_group_of_its_own(mode):
    plan = make_plan(config(placement={"mode": mode}, rollout={"replicas": 2, "tensor_parallel_size": 4}), CLUSTER)
    for index in range(2):
        group = plan.groups[f"rollout-{index}"]
        assert group.strategy == "STRICT_PACK"
        assert [bundle["GPU"] for bundle in group.bundles] == [1.0] * 4
        assert plan.seats["rollout"][index].bundles == (0, 1, 2, 3)


def test_exact_runs_never_overlap():
    plan = make_plan(config(run={"determinism": "exact"}, placement={"mode": "disaggregated", "overlap": "on"}), CLUSTER)
    assert not plan.overlap


def test_too_little_hardware_says_what_is_asked_and_what_is_there():
    with pytest.raises(UserError, match=r"asked for 17 CPUs .*policy 4 x \(4 CPU, 0 GPU\).* has 2 CPUs and 0 GPUs"):
        make_plan(config(placement={"policy": {"ranks": 4, "cpus": 4}}), LAPTOP)
    with pytest.raises(UserError, match="the cluster has 2 CPUs and 0 GPUs"):
        make_plan(config(placement={"policy": {"gpus": 1}}), LAPTOP)


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
    seats = make_plan(config(**sections), machine).seats
    order = building_order(seats)
    assert set(order[0]) == first
    assert sorted(role for roles in order for role in roles) == sorted(seats)


def test_weights_that_go_from_gpu_to_gpu_need_gpus_at_both_ends():
    sections = {"placement": {"mode": "disaggregated"}, "rollout": {"weight_transfer": "nccl"}}
    assert make_plan(config(**sections), CLUSTER).seats["policy"][0].gpus
    with pytest.raises(UserError, match=r"weight_transfer: 'nccl' goes from GPU to GPU, and the policy has none"):
        make_plan(config(**sections), Machine((64.0,), (0.0,)))
