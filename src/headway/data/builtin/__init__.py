"""Built-in data sets, found by file name: `NAME.py` here has `pairs(*, keep_stress: bool)`, and NAME is a source."""
