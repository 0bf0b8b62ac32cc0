"""Code as users write it, for mypy to read: nothing here is run.

What must be accepted has its type stated by `assert_type`. What must be refused has a `type: ignore` with the code of
the error: `warn_unused_ignores` is on in this folder, so that a wrong call which mypy lets pass is an error itself.
"""
