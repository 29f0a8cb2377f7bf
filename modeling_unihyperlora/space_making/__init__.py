"""Making a canonical space, and refining a host's map into it."""
