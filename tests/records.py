"""Reading records: forms, keys that change what is asked, encodings, and the account of every record."""
