"""Files on disk: adapter directories, import from and export to other formats. Nothing here computes predictions."""
