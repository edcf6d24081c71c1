"""Attention over weighted tokens; nothing here knows who holds them."""
