"""The parts of tools/setup. They use only the standard library and run on any Python from 3.8 on."""
