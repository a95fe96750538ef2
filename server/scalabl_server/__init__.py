"""The service: HTTP in front of the method in `scalabl`. Nothing below imports from here."""
