"""One command that measures the library on a GPU and leaves one folder of records."""
