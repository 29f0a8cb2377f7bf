"""Reading a corpus into canonical states. Only the installed package has this; adapter folders do not contain it."""
