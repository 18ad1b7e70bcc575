"""What `test_all.py` draws in: builders, tables of bad inputs, slow and hostile tests."""
