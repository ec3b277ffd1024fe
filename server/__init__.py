"""The ASGI server around an engine in its own process, and the command line: the outermost floor, which knows the engine."""
