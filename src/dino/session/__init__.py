"""Between a person and the machine: how a session begins and is watched, where pictures and weights are."""
