"""The default store: one SQLite file in the run's folder."""

from leyden.sqlite.store import SQLiteStore as SQLiteStore

__all__ = ["SQLiteStore"]
