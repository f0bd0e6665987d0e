"""Search, duplicates, clusters, maps and selections over an index of image features."""
