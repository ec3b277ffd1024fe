"""Products of activations with weight matrices, in the form in which a device wants to read the weights."""
