"""HTTP: routes, middleware, access control, and errors as HTTP answers.

The routes of `open_inference` and `dashboard` are in their own packages; their errors too become answers in `errors`.
"""
