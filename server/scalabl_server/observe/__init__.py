"""What is observed of the server: metrics, logs, traces and spans. Nothing here changes an answer."""
