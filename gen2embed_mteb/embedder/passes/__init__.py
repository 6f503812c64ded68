"""Forward passes: from prepared inputs to vectors, for `encode` and for bulk encoding."""
