"""The JSON schemas of the server's own routes. Those of the dashboard and the Open Inference Protocol are in their packages."""
