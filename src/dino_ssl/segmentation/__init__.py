"""Masks of the objects in images without labels, and files of them for other tools."""
