"""Drawings as SVG and PNG, made of a few shapes; no drawing library is needed."""
