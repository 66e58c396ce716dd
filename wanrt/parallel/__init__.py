"""Topologies, and tensor or sequence parallelism applied to a transformer from outside."""

from wanrt.parallel.plan import ShardPlan
from wanrt.parallel.topology import MeshKind, ModelShape, Topology, check

__all__ = ["MeshKind", "ModelShape", "ShardPlan", "Topology", "check"]
