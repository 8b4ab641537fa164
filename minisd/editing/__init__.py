"""Editing methods: each a small file on the public seams of minisd."""
