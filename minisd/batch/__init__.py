"""Many images of a file of rows: rows.py says what is to be drawn, work.py draws a piece of it,
engines.py hands the pieces to workers."""
