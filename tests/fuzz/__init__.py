"""Fuzzing of what reads files and saved states: `make fuzz`, in part in tests/test_fuzz.py."""
