"""Text as canonical states: what reads a corpus, of the installed package alone; no adapter brings it along."""
