"""Declared schemas of session logs: TOML files that say what the tables, groups and experts are."""
