"""Measuring an adapter's costs, and its fit to a host."""
