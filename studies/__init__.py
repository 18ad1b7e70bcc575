"""What measures, compares, counts and draws: `python -m studies.NAME`. Nothing imports it but tests."""
