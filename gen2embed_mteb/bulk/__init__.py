"""Bulk encoding: batches by number of tokens, a pipeline of threads, a store on disk, and several processes.

This package does not depend on a particular model; `types.Encoder` states what it needs of one.
"""
