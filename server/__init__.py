"""The command line, and in time the ASGI server: the outermost floor, which knows the engine and which nothing knows."""
