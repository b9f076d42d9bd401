"""What all tests share: no network, no telemetry, and Ray as a user's machine would run it, but without a token in HOME."""

import atexit
import os
import shutil
import signal
import tempfile

from hypothesis import settings

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two test processes must not find each other's clusters: a run joins the one that Ray's folder names, and ends with it.
if "PYTEST_XDIST_WORKER" in os.environ or "RAY_TMPDIR" not in os.environ:
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="r", dir="/tmp")
    atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

# A deadline of milliseconds fails for nothing on a machine that does something else at the same time. In CI the same examples
# are drawn every time, so that a change is judged by what it changes; elsewhere every run looks at new ones.
settings.register_profile("rayrlhf", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("rayrlhf")

# A shell that runs the tests in the background lets them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
