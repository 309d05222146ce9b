"""Parts of the tools that no user imports by name."""
