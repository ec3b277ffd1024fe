"""What an EAGLE-3 head keeps of the target's tokens, as one op."""
