"""The prepared store: chunks on disk or behind a URL, read as windows; MDS folders beside them."""
