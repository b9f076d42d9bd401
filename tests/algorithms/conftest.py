"""Property tests run the same examples everywhere and have no time limit per example: machines that share cores stall."""

from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
