"""The dashboard's pages, one file each: choose, filter, draw."""
