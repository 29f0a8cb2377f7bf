"""Entry points for users; what measures, records and draws is ``scripts.research``."""
