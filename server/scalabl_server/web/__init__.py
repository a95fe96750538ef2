"""HTTP: routes, middleware, API keys, and error responses.

The routes of `open_inference` and `dashboard` are in their own packages; their error responses are made in `errors` too.
"""
