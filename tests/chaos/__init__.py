"""Real small PPO jobs that are hurt while they run; each is compared with an undisturbed twin, bit for bit where it is exact.

`pytest -m slow tests/chaos` runs six kills, a resume, and a look at what a run leaves behind. By hand, one piece at a time,
each below nine minutes on two cores unless it says more, `-s` for the table of recovery times:

    pytest -m nightly -s tests/chaos/test_kills.py -k "thirty and 0"    ten kills a piece, pieces 0 to 2, one machine
    pytest -m nightly -s tests/chaos/test_nodes.py -k "nothing and 0"   lost nodes, drivers, processes; pieces 0 and 1
    pytest -m nightly -s tests/chaos/test_nodes.py -k thirty            thirty of them in one job, about ten minutes
    pytest -m nightly -s tests/chaos/test_nodes.py -k not_answer        a reward that hangs
    pytest -m nightly -s tests/chaos/test_nodes.py -k memory            a process that Ray's memory monitor ends
    pytest -m nightly -s tests/chaos/test_nodes.py -k network           calls that Ray loses on purpose
    pytest -m nightly -s tests/chaos/test_leaks.py                      what a run and a dead driver leave, without vLLM
    pytest -m nightly -s tests/chaos/test_growth.py                     200 steps, no process may grow
    pytest -m nightly -s tests/chaos/test_full_disk.py                  a disk that fills up in a run or at its end
    RAYRLHF_SOAK_KILLS=8 pytest -m nightly -s tests/chaos/test_soak.py  kills at any instant (60), also of SFT and Pre-SFT
"""
