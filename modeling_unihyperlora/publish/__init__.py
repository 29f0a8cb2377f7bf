"""What becomes of an adapter: its bundle, card, Hub repository, and other formats."""
