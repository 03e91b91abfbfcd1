"""How a search ends before its method does."""


class SearchOver(Exception):
    """Ends a search with the best that it has found; says why."""
