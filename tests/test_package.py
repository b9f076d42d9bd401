"""The package and its command line answer at once: heavy imports wait until they are needed."""

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

HEAVY = ("torch", "ray", "transformers", "vllm", "deepspeed", "datasets", "pandas")


def test_neither_the_package_nor_its_command_line_imports_anything_heavy():
    code = f"import sys, rayrlhf, rayrlhf.cli; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_costs_less_than_a_second_of_processor_time():
    code = (
        "import resource, subprocess, sys; subprocess.run([sys.argv[1], '--help'], check=True, stdout=subprocess.DEVNULL);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    )
    command = str(Path(sys.executable).with_name("rayrlhf"))
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


def test_public_names_are_imported_on_first_use():
    import rayrlhf
    from rayrlhf.config.ppo import PPOConfig

    assert rayrlhf.PPOConfig is PPOConfig
    assert set(rayrlhf.__all__) >= {"train_ppo", "PPOTrainer", "load_config", "Callback"}


def test_modules_do_not_import_each_other_in_a_cycle():
    import grimp

    graph = grimp.build_graph("rayrlhf", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) - {module} for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError with the modules of a cycle
