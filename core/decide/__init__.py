"""What to do with a message: the port, the rules, the gates before them."""
