"""Images, masks and videos that the package renders itself."""
