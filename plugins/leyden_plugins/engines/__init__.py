"""Engines: what samples tokens for the policies."""
