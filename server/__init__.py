"""quire.server."""
