"""Files on disk: adapter directories, conversions from other projects, exports. Nothing here computes an answer."""
