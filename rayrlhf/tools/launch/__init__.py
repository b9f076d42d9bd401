"""Before and around a run: what fits where, manifests for a cluster, and submission to one."""
