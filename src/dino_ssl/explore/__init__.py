"""The web page of an index: a starlette application on this computer, and its static files."""
