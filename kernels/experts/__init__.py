"""The experts of a mixture: which of them compute which tokens, and how."""
