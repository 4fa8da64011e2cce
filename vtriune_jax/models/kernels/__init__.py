"""Ways to compute attention, one a file, all of the same signature and the same result.

`models.attention` chooses among them.
"""
