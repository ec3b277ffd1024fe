"""One file per device: what it can do, which step shapes it compiles, how it compiles them, how much memory it has."""
