"""Datasets, decoding, augmentation and data loading."""
