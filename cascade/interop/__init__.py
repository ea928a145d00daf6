"""Weights of others in, ours out. Only file formats are read: no other framework is imported."""
