"""What a process tells of its memory is its peak and not what it has now, and a role is as large as its largest process."""

import subprocess
import sys

import pytest

from rayrlhf.actors.footprint import Footprint, own_footprint, role_peaks
from rayrlhf.config.section import GIB

BIG = 300 * 2**20


def test_the_footprint_is_the_peak_even_when_the_memory_is_free_again():
    code = f"""
from rayrlhf.actors.footprint import own_footprint
before = own_footprint().resident
held = bytearray({BIG})
del held
print(before, own_footprint().resident, own_footprint().device)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after, device = map(int, out.split())
    assert BIG * 0.9 < after - before < BIG * 1.3
    assert device == 0


def test_asking_for_the_footprint_imports_no_torch():
    code = "import sys; from rayrlhf.actors.footprint import own_footprint; own_footprint(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_process_that_computes_rewards_without_a_model_imports_no_torch():
    code = "import sys, rayrlhf.actors.reward_actor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_without_a_recorded_peak_the_resident_size_stands_in(tmp_path):
    assert own_footprint(tmp_path / "status").resident > 10 * 2**20


def test_a_role_is_as_large_as_its_largest_process():
    footprints = {
        "a/b/policy/0": Footprint(2 * GIB, 3 * GIB),
        "a/b/policy/1": Footprint(GIB, 5 * GIB),
        "a/b/reward/0": Footprint(GIB // 2),
    }
    assert role_peaks(footprints) == pytest.approx(
        {"memory/policy_gib": 2.0, "memory/policy_device_gib": 5.0, "memory/reward_gib": 0.5}
    )
