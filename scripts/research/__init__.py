"""Everything that measures, records and draws; ``python -m scripts.research.NAME`` from the root of the repository."""
