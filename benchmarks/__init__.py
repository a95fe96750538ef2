"""What the README's numbers come from, one command each."""
