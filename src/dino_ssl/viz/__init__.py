"""Figures of attention, features and tracked objects."""
