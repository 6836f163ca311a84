"""Built-in data sets, found by file name: `NAME.py` here has `rows()`, and NAME is a source in a recipe.

`COLUMNS` gives, in the order of a row's values, the part each column plays and its name: {"input": "word", ...}.
"""
