"""Roofline and profile of a training step and of the data path."""
