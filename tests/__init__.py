"""The tests, a folder for each room of the package, and suites that cut across the rooms.

All folders are packages: so pytest imports each file under its full name, and `tests.support` is
found whatever the path that Python looks along, in its isolated mode too.
"""
