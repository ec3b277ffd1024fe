"""This engine beside its peers: each in a process and an environment of its own, on the same checkpoint and the same requests."""
