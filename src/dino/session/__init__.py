"""Between a person and the machine: how a session begins, how it is watched, where pictures and weights are."""
