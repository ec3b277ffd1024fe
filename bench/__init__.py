"""Benchmarks: each prints one JSON line, measured in one run on the machine it runs on."""
