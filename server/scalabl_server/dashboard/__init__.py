"""The page at `/dashboard`: its files, the JSON that it draws, and what that is computed from."""
