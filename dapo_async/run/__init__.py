"""A run put together: what is checked before it starts, whether it fits into memory, starting and ending it."""
