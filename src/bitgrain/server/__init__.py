"""The HTTP server; needs the extra `server`."""
