"""The measurements behind the numbers in the documentation, one command each. Tests may use it; the server never does."""
