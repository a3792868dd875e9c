"""Checkpoints: reading, checking, packing and unpacking tensors by a weight map."""
