"""Stores predictions and the labels that arrive later in a database, and counts them for `/metrics`. No HTTP is here."""
