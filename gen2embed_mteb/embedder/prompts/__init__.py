"""The two-level prompt: its texts, the strategies by name, and those with texts per dataset."""
