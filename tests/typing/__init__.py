"""Code as users write it, for mypy to check: nothing here is run.

What mypy must accept has its type stated by `assert_type`. What it must reject has a `type: ignore` with the code of
the error: `warn_unused_ignores` is on in this folder, so that a wrong call that mypy accepts is an error itself.
"""
