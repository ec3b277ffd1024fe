"""The operations that models and steps are made of: one folder per op, one reference and one conformance suite each."""
