"""Metrics, logs, traces and OpenTelemetry spans of the server. Nothing here changes an answer."""
