"""Where arrays live: the device mesh and the rules that lay parameters and batches over it."""
