"""Reading tables that others wrote: faulty rows are counted and set aside, and missing shards are errors."""
