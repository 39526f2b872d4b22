"""One file per page: choose, filter, draw."""
