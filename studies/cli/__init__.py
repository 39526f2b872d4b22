"""The `kronscope` command."""
