"""Topologies, process groups, and the sharding that is applied to a model from outside."""
