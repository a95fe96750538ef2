"""The JSON schemas of the server's own routes. Those of the dashboard and of `open_inference` are in their packages."""
