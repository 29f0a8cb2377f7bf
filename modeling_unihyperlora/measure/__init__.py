"""What an adapter costs, and how it fits a host."""
