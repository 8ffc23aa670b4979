"""Repair tasks on real code: one wrong token in a real package, which the package's own tests detect."""
