"""Collapse: checks of settings and metrics, and the reaction of a session."""
