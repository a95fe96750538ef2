"""The JSON of the server's own routes. That of the dashboard and of the Open Inference Protocol is in their packages."""
