"""Capacity planning: the real scheduler on simulated chips, under the load that users expect."""
