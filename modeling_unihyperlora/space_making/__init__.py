"""Making a canonical space, and refining a map into it."""
