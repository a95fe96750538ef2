"""One module per version; never changed once released."""
