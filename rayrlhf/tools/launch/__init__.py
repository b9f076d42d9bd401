"""Launching a run: placement and memory plans, cluster manifests, job submission."""
