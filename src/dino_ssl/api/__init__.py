"""The Python calls: train, evaluate, embed, attention; the command line uses the same functions."""
