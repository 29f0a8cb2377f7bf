"""Publishing an adapter: bundle, model card, Hub repository, and export to other formats."""
