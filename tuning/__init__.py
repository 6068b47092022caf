"""Searches over transfer and pretraining configs (arrives with `rayograph tune`)."""
