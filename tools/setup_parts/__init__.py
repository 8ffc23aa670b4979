"""The parts of tools/setup; standard library only, and any Python 3.8 or newer."""
