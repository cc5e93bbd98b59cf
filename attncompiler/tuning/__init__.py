"""Schedules, the search over them, and what they cost."""
