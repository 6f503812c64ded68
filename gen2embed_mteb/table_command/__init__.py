"""`gen2embed table`, a part of the command line: what a published table needs, what is missing, and the table."""
