"""The statements: a module for each, or for a family of them, with its `CLAIMS`."""
