"""Repair tasks on real code: one wrong token in a real package, found by its own tests."""
