"""The web page at `/dashboard` and the JSON that it shows. Reading the database is in `outcomes`."""
