"""RLHF as a distributed actor system on Ray."""

__version__ = "0.1.0"
