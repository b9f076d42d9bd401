"""Whether this machine can run what is installed on it: facts are gathered once, checks on them are pure."""
