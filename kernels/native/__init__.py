"""The C++ kernels of the CPU: what they share (headers), and loading the library that serves this machine."""
