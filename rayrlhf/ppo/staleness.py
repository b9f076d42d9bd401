"""How far sampling may run ahead of training: the capacity rule of asynchronous RLHF (AReaL, arXiv 2505.24298). Pure.

A sample belongs to a step from the moment it is issued. Those of step b may be issued once b - n steps are done. Weights only
get newer afterwards, also for what is cut or lost and sampled again; so no token of step b is more than n versions old when it
trains.
"""


def capacity(steps_done: int, issued: int, samples_per_step: int, max_staleness: int, last_step: int) -> int:
    """Return how many more samples may be issued now.

    Args:
        steps_done: PPO steps completed.
        issued: samples issued for all steps so far, those of completed steps included.
        samples_per_step: of each step.
        max_staleness: n, in weight versions.
        last_step: the run's number of steps; nothing is sampled for a step beyond, but a step that begins is always served.
    """
    steps = max(min(steps_done + 1 + max_staleness, last_step), steps_done + 1)
    return max(steps * samples_per_step - issued, 0)
