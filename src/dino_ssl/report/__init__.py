"""The HTML report of a run, and the snapshots that it shows."""
