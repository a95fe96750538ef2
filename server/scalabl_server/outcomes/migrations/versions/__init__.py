"""One module per version of the tables. A released module never changes what it does."""
