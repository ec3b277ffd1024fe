"""A whole decoder layer as one op, for devices on which the pieces between the products cost too much by themselves."""
