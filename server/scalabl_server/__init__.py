"""The HTTP server and the command line for the method in `scalabl`. The lower packages do not import from here."""
